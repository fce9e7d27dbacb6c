"""`hf-relpos check`: position schemes on a tiny model. The rest is imported when the flags were read, so that `--help`
does not wait for it."""

import sys
from dataclasses import dataclass, field

from .cli import IMPORT_FILE, command, parse_arguments, say_train_next
from .file_reading import parse_json


DESCRIPTION = """\
Tries position schemes on a tiny model, in seconds: causality, padding, batches, caches, packing, gradients, saving.

hf-relpos check my_scheme.py
hf-relpos check alibi rotary+log_cpb

A scheme is a class that overrides some hooks, which `help(hf_relpos.PositionEmbedding)` explains, as in

  import torch
  from hf_relpos import PositionEmbedding, register_position_embedding

  @register_position_embedding("log_decay")
  class LogDecay(PositionEmbedding):
      def __init__(self, config):
          super().__init__(config)
          self.strength = torch.nn.Parameter(torch.ones(config.num_attention_heads))

      def reset_parameters(self):
          torch.nn.init.ones_(self.strength)

      def distance_bias(self, distance):  # (n,) integers to (heads, n) in fp32
          return -self.strength.float()[:, None] * torch.log1p(distance.float())
"""


@dataclass
class CheckArguments:
    """Which schemes are tried."""

    pos_embedding_type: str | None = field(
        default=None,
        metadata={"help": "A scheme, as for train; by default all that the imported files define."},
    )
    pos_embedding_kwargs: str | None = field(
        default=None, metadata={"help": "Options of the scheme as JSON; those of its class by default."}
    )


@command
def main() -> None:
    """Prints a line for each check of each scheme; exit code 2 and a line on stderr if a scheme does not pass."""
    words, flags = [], sys.argv[1:]
    while flags and not flags[0].startswith("-"):  # FILE.py or NAME, which need no flag
        words.append(flags.pop(0))
    files = [word for word in words if word.endswith(".py")]
    names = [word for word in words if word not in files]
    flags += [f"--{IMPORT_FILE}={file}" for file in files]
    (args,) = parse_arguments((CheckArguments,), DESCRIPTION, flags)
    from .scheme_check import check_position_embedding
    from .scheme_files import imported_schemes

    names += [args.pos_embedding_type] if args.pos_embedding_type else []
    names = names or imported_schemes()
    if not names:
        raise ValueError("a scheme is needed: the file that defines it, or the name of one that `schemes` lists.")
    options = parse_json(args.pos_embedding_kwargs or "{}", "`pos_embedding_kwargs` must be JSON")
    refusals = []
    for name in names:
        report = check_position_embedding(name, pos_embedding_kwargs=options)
        print(report, flush=True)
        refusals += filter(None, [report.refusal])
    if refusals:
        raise ValueError("; ".join(refusals))
    say_train_next(names[0])
