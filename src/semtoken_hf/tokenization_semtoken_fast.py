from transformers import PreTrainedTokenizerFast
class SemTokenFastTokenizer(PreTrainedTokenizerFast):
    pass
