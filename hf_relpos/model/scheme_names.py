"""What a name that is no scheme's probably means: the usual names of papers and other libraries."""

import difflib
import re
from collections.abc import Iterable


# endings that say nothing, after all but letters and digits was taken out
ENDINGS = re.compile(r"(position|positional|pos)?(embeddings?|encodings?|emb|bias|biases)$|(positions?|positional)$")
# scheme → what it is called elsewhere; endings as above may follow
USUAL_NAMES = {
    "rotary": "rope ropes roformer rotation rotations rot partialrope partialrotary rotaryhalf mrope",
    "none": "nope no nopos null nothing off causal without",
    "learned": "absolute abs ape lape learnable learnt learn trainable trained table gpt gpt2 bert opt wpe",
    "sinusoidal": "sin sine sines sinus sincos cos cosine fixed vanilla transformer vaswani spe fourierfeatures",
    "scaled_sinusoidal": "scaledsin scaledsine scaledsinus",
    "alibi": "linear linearbiases attentionwithlinear attentionwithlinearbiases press mpt bloom slopes",
    "t5": "relative rel rpe t5relative t5rel t5rpe relativebias bucket buckets bucketed shaw",
    "linear_cpb": "cpb continuous continuousposition mlp mlpbias swin",
    "log_cpb": "logcontinuous logspacedcpb logspaced swinv2 swin2",
    "kerple_log": "kerple kerplelogarithmic logarithmic",
    "kerple_power": "power kerplepow",
    "fire": "functionalinterpolation functional",
    "fox": "forget forgetting forgetgate forgettinggate forgettingtransformer forgettingattention gated",
    "cope": "contextual contextualposition",
    "dape": "dataadaptive",
    "pope": "polar polarcoordinate",
    "xpos": "lex lextransformer lengthextrapolatable retnet",
    "temperature": "logn lognscaling scale ssmax softmaxtemperature entropy",
}
# scalings of a rotation, which `rope_parameters` states
SCALINGS = "yarn ntk ntkaware dynamic dynamicntk llama3 longrope proportional interpolation pi su".split()


def scheme_hint(name: object, allowed: Iterable[str]) -> str:
    """→ a sentence about a name that is none of those allowed: which is meant, or how one's own is made known."""
    allowed = list(allowed)
    plain = re.sub(r"[^a-z0-9]", "", str(name).lower())
    for word in (plain, ENDINGS.sub("", plain)):
        for scheme in allowed:
            if word and (
                word == re.sub(r"[^a-z0-9]", "", scheme.lower()) or word in USUAL_NAMES.get(scheme, "").split()
            ):
                return f"Did you mean {scheme!r}?"
        if {word, word.removesuffix("rope"), word.removeprefix("rope")} & {*SCALINGS}:
            return "Did you mean 'rotary', scaled by `rope_parameters`?"
    near = difflib.get_close_matches(str(name), allowed, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    return (
        "A scheme of your own must be imported first: --import_file FILE, or hf_relpos.import_scheme_file(FILE) in "
        "Python; the folder of a saved model carries its file."
    )
