"""The registry of tasks."""

from __future__ import annotations

from .base import Task, TaskSettings
from .longbench import CHINESE, SUBSETS, LongBench
from .multihop import MultiHop
from .perplexity import Perplexity
from .retrieval import KeyValues, Needle
from .summaries import Summaries
from .tables import Tables

TASKS: dict[str, Task] = {
    "wikitext": Perplexity(
        "WikiText-103",
        "perplexity",
        "wikitext-103/test.txt",
        "Salesforce/wikitext",
        is_perplexity=True,
        hub_name="wikitext-103-v1",
    ),
    "longbench": LongBench(
        "LongBench, English and code",
        "official metrics",
        "longbench_mini.jsonl.xz",
        "Xnhyacinth/LongBench",
        subsets=tuple(s for s in SUBSETS if s not in CHINESE),
    ),
    "longbench_zh": LongBench(
        "LongBench, Chinese", "official metrics", "longbench_mini.jsonl.xz", "Xnhyacinth/LongBench", subsets=CHINESE
    ),
    "hotpotqa": MultiHop("HotpotQA", "F1", "hotpotqa.jsonl.xz", "hotpotqa/hotpot_qa", hub_name="distractor"),
    "musique": MultiHop("MuSiQue", "F1", "musique.jsonl.xz", "dgslibisey/MuSiQue"),
    "qmsum": Summaries("QMSum", "ROUGE-L", "qmsum.jsonl.xz"),
    "booksum": Summaries("BookSum", "ROUGE-L", "booksum.jsonl.xz", "kmfoda/booksum"),
    "tables": Tables(
        "WikiTableQuestions", "relaxed accuracy", "wikitablequestions.jsonl.xz", "stanfordnlp/wikitablequestions"
    ),
    "chartqa": Tables("ChartQA", "relaxed accuracy", "chartqa"),
    "kv_retrieval": KeyValues("key-value retrieval", "found", "kv_retrieval_75.jsonl.xz"),
    "needle": Needle("needle in a haystack", "found"),
}

__all__ = ["TASKS", "Task", "TaskSettings"]
