"""Pellucid side by side with other transparent proxies: the same work on the same machine in the same run. See README.md."""
