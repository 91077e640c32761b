"""What the kernel really does, shown in network namespaces: no test here is ever skipped."""
