"""Pre-training: one optimiser step, the loop around it, and what is written on the way."""

from poa.train.loop import RunResult, pretrain
from poa.train.report import ConsoleReporter, Reporter

__all__ = ["ConsoleReporter", "Reporter", "RunResult", "pretrain"]
