"""RAFT for sftx: a rollout that trains on the best of the model's own answers, and a reward that counts words."""

from sftx_raft.raft import Raft
from sftx_raft.word_overlap import WordOverlap

__all__ = ["Raft", "WordOverlap"]
