"""Random valid calls, each with an oracle. `scripts/fuzz.py` makes as many as one likes.

What no call may be given is refused by name: law 10 tests that. Not drawn: `SemTokenCache.crop` behind merged slots
where a prompt is padded other than on the left, which has no columns to take.
"""
