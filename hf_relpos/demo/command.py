"""`hf-relpos demo`: its flags. The rest is imported when the flags were read, so that `--help` does not wait for it."""

from dataclasses import dataclass, field

from ..cli import command, parse_arguments


DESCRIPTION = """\
A page in the browser for saved models: their text side by side, the loss by position as a difference to the first
model, the attention of a head by distance, and the learned bias.

hf-relpos demo output/alibi output/rotary
"""


@dataclass
class DemoArguments:
    """Where the page is served."""

    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 for all of the machine."})
    port: int = field(default=7860, metadata={"help": "Port to listen at."})
    share: bool = field(default=False, metadata={"help": "Also publish the page on the internet, through gradio.live."})


@command
def main() -> None:
    """The command line of scripts/demo.py."""
    args, names = parse_arguments((DemoArguments,), DESCRIPTION, positional="DIR")
    from .app import serve_page

    serve_page(names, args.host, args.port, args.share)
