"""One file a kind of proposer, and how one asks another; each has `propose(states, committed, budget) ->
list[DraftTree]`.
"""
