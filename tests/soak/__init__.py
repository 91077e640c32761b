"""A long run that looks for leaks: connections of every kind, pods and policies that come and go, and what is left of it all."""
