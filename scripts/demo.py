#!/usr/bin/env python
"""A page in the browser for saved models: their text side by side, their loss by position, their learned bias.

python scripts/demo.py output/alibi output/rotary
"""

from dataclasses import dataclass, field

from hf_relpos.cli import command, parse_arguments
from hf_relpos.demo.app import serve_page


@dataclass
class DemoArguments:
    """Where the page is served."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 for all of the machine."})
    port: int = field(default=7860, metadata={"help": "Port to listen at."})
    share: bool = field(default=False, metadata={"help": "Also serve the page to the world, through gradio.live."})


@command
def main() -> None:
    args, names = parse_arguments((DemoArguments,), __doc__, positional="DIR")
    serve_page(names, args.host, args.port, args.share)


if __name__ == "__main__":
    main()
