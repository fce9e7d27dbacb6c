"""Stands for a file that transformers' source distribution lacks: without its repository no generation test is run."""


class GenerationTesterMixin:
    input_name = "input_ids"
    model_tester = None
    max_new_tokens = 3
