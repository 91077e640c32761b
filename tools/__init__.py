"""Scripts that make and check what lies in the tree. Run by the Makefile; nothing here is shipped."""
