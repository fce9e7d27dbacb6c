"""The tables of PEFT that say which layers of a model an adapter changes if its configuration does not."""

import sys


def enter_peft_tables(model_type: str, like: str = "llama") -> None:
    """Enters a kind of model in each table that has another kind, whose layers have the same names.

    Nothing happens where PEFT was not imported: it reads its tables when it has a model, after it was.
    """
    tables = sys.modules.get("peft.utils.constants")
    for table in vars(tables).values() if tables else ():
        if isinstance(table, dict) and like in table:
            table.setdefault(model_type, table[like])
