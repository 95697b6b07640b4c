"""Break it: random calls on everything public, each with an oracle. `scripts/fuzz.py` makes as many as one likes.

What is not drawn, since Transformers or the caller would be at fault:
- sizes of a family's or an encoder's own layers between 2,000 and 2**40 in a damaged `config.json`: Transformers takes
  that memory before it finds that the weights do not fit;
- endless `max_new_tokens`, and `num_beams` beyond 100 in a generation configuration;
- `SemTokenCache.crop` behind merged slots where a prompt was padded other than on the left: that has no columns.

Refused in the words of plain Transformers (kind "as in Transformers"): ids out of the vocabulary where nothing merges,
masks of another shape there, damaged files that it reads itself, options of its own.
"""
