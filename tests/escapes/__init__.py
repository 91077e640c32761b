"""Ways around a policy, a file each, and the policies that must hold against them.

techniques  what an attacker's pod does, and what must come of it; the file's name is the technique's
policies    a policy for each kind of attacker, of the pods whose label app is the file's name
corpus      the files, read strictly
wire        their steps as bytes and packets

tests/netns/product/test_escapes.py runs them against the whole product; docs/escapes.md lists them (tools/escapes_table.py).
"""
