"""What the kernel does for us: nftables rules that select, decide by address and hand over, and the routes beside them.

Belongs here: state, ruleset, address_rules and totals, which are pure; apply, routing and preflight, which touch the kernel.
Does not: policy's meaning (pellucid_policy) and connections (engine). tests/netns shows every fact that this rests on.
"""
