"""Fuzzing of everything that reads what clients send: python -m fuzz.run --target all --executions 20000 --seed 1

targets     what is run, and what must hold of it whatever the input
mutate      inputs made of the corpora, kept when they lead somewhere new
corpora     seeds, a folder for each target; a file that once broke something stays there
"""
