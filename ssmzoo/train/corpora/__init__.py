"""Corpora: documents as token ids in shards, to train on.

from ssmzoo.train.corpora import tokenize

tokenize({"web": "web/", "code": "code.jsonl.gz"}, "corpus", "tokenizer.json", end="<|endoftext|>")
"""

from ssmzoo.train.corpora.manifest import Manifest, Shard, read_manifest
from ssmzoo.train.corpora.tokenize import tokenize

__all__ = ["Manifest", "Shard", "read_manifest", "tokenize"]
