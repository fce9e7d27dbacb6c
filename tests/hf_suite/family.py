"""transformers' own common tests, pointed at one family of causal language models: ours under one scheme, or a peer.

Copied to where those tests lie and run there by `run.py`. Environment:
    HF_SUITE_MODULE   the module that has the classes: `hf_relpos` or `transformers`
    HF_SUITE_PREFIX   the prefix of its classes: `RelPos`, `Llama`, ..
    HF_SUITE_CONFIG   JSON of further fields of the configuration, such as `pos_embedding_type`
"""

import dataclasses
import importlib
import json
import os
import unittest

import torch

from .. import test_fsdp_mixin, test_tensor_parallel_mixin
from ..exporters.test_export import ExportTesterMixin
from ..generation.test_utils import GenerationTesterMixin
from ..test_configuration_common import ConfigTester
from ..test_modeling_common import ModelTesterMixin, ids_tensor, torch_device
from ..test_pipeline_mixin import PipelineTesterMixin
from ..test_training_mixin import TrainingTesterMixin


try:  # with the repository of transformers; its source distribution lacks the file
    from ..causal_lm_tester import CausalLMModelTest, CausalLMModelTester
except ImportError:
    CausalLMModelTest, CausalLMModelTester = None, object
HAS_REPOSITORY = CausalLMModelTest is not None

MODULE = importlib.import_module(os.environ["HF_SUITE_MODULE"])
PREFIX = os.environ["HF_SUITE_PREFIX"]
FIELDS = json.loads(os.environ.get("HF_SUITE_CONFIG") or "{}")
CONFIG = getattr(MODULE, f"{PREFIX}Config")
HEADS = {
    "base_model_class": "Model",
    "causal_lm_class": "ForCausalLM",
    "sequence_classification_class": "ForSequenceClassification",
    "token_classification_class": "ForTokenClassification",
    "question_answering_class": "ForQuestionAnswering",
}
CLASSES = {attribute: getattr(MODULE, PREFIX + suffix, None) for attribute, suffix in HEADS.items()}

# transformers runs the tests of several processes for a list of model types only; here for every family with a plan
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None

# what a configuration neither declares nor maps is left out
STANDARD = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=32,
    hidden_act="gelu",
    max_position_embeddings=512,
    initializer_range=0.02,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)


class FamilyModelTester(CausalLMModelTester):
    """The small configuration of a family and inputs for it."""

    config_class = CONFIG
    batch_size = 13
    seq_length = 7
    is_training = True
    use_labels = True
    use_input_mask = True
    type_sequence_label_size = 2
    num_labels = 3
    num_choices = 4

    def __init__(self, parent, **kwargs):
        if HAS_REPOSITORY:
            super().__init__(parent, **kwargs)
        self.parent = parent
        for name, value in STANDARD.items():
            if not hasattr(self, name):
                setattr(self, name, value)

    def get_config(self):
        declared = {field.name for field in dataclasses.fields(CONFIG)} | {
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
        }
        renamed = getattr(CONFIG, "attribute_map", {})
        given = {
            renamed.get(name, name): getattr(self, name) for name in STANDARD if name in declared or name in renamed
        }
        config = CONFIG(**given, **FIELDS)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            assert getattr(config, name) == getattr(self, name), name
        return config

    if not HAS_REPOSITORY:

        def prepare_config_and_inputs_for_common(self):
            input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
            return self.get_config(), {
                "input_ids": input_ids,
                "attention_mask": torch.tril(torch.ones_like(input_ids).to(torch_device)),
            }


for attribute, model_class in CLASSES.items():
    setattr(FamilyModelTester, attribute, model_class)


class WithoutTheRepository(
    ModelTesterMixin,
    GenerationTesterMixin,
    ExportTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    """What `causal_lm_tester.py` of the repository does: which classes are tested, and two tests of its own."""

    def setUp(self):
        self.model_tester = FamilyModelTester(self)
        self.all_model_classes = tuple(cls for cls in CLASSES.values() if cls is not None)
        self.pipeline_model_mapping = {
            "feature-extraction": CLASSES["base_model_class"],
            "text-generation": CLASSES["causal_lm_class"],
        }

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        output = CLASSES["base_model_class"](config).to(torch_device).eval()(**inputs)
        tester = self.model_tester
        assert output.last_hidden_state.shape == (tester.batch_size, tester.seq_length, tester.hidden_size)


class FamilyModelTest(CausalLMModelTest if HAS_REPOSITORY else WithoutTheRepository, unittest.TestCase):
    model_tester_class = FamilyModelTester
    test_can_init_all_missing_weights_before_2023 = MODULE.__name__ != "transformers"  # asked of new families
    model_tester = None  # abstract in the mixins; set for each test

    def setUp(self):
        super().setUp()
        self.config_tester = ConfigTester(self, config_class=CONFIG, **FIELDS)


FamilyModelTest.__abstractmethods__ = frozenset()
# pytest would collect what only serves as a base
WithoutTheRepository.__test__ = False
FamilyModelTest.__test__ = True
del CausalLMModelTest
