"""Fuzzing of everything that reads what others send: python -m fuzz.run --target all --executions 20000 --seed 1

run         runs targets and prints executions and crashes; under_atheris is one target guided by coverage
targets     what is run, and what must hold of it whatever the input: parsers, and all of decisions and messages
decisions   the same of policies and whole sessions
messages    the same of what processes, upstream proxies and users of the status socket say
claims      what targets are made of
mutate      inputs made of the corpora, kept when they lead somewhere new
corpora     seeds, a folder for each target; a file that once broke something stays there
"""
