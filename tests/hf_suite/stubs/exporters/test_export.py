"""Stands for a file that transformers' source distribution lacks: without its repository no export test is run."""


class ExportTesterMixin:
    pass


class ExportGenerateTesterMixin:
    pass
