"""What each kind of process may do, and how it gives up the rest.

Belongs here: the table of rights, users, capabilities, the workers' seccomp filter. table, syscalls and program are pure; users and
confine ask and change this process. Does not: starting processes, or what they do.
"""
