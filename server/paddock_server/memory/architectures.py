"""What llama.cpp knows about architectures and a GGUF file does not say: one table per question.

Read from src/models/*.cpp, llama-arch.cpp and llama-model.cpp of the llama.cpp in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Window(NamedTuple):
    """Which layers slide: of each `period` all but the last, or all but the first with `dense_first`.

    `period` 0 reads it from the file alone. `tokens` is the window of a file that gives none; 0 is no window
    then. `is_fixed` makes `tokens` the window whatever the file gives, as long as it gives one.
    """

    period: int
    dense_first: bool = False
    tokens: int = 0
    is_fixed: bool = False


WINDOWS: Final[Mapping[str, Window]] = MappingProxyType(
    {
        "afmoe": Window(4),
        "cohere2": Window(4),
        "cohere2moe": Window(4, dense_first=True),
        "dflash": Window(0),
        "exaone-moe": Window(4, tokens=128),
        "exaone4": Window(4, tokens=4096),
        "gemma-embedding": Window(6),
        "gemma2": Window(2, tokens=4096),
        "gemma3": Window(6),
        "gemma3n": Window(5),
        "gemma4": Window(0),
        "gemma4-assistant": Window(0),
        "gpt-oss": Window(2),
        "granite_swa": Window(0),
        "laguna": Window(4, dense_first=True),
        "llama4": Window(4, tokens=8192, is_fixed=True),
        "maple": Window(0),
        "mellum": Window(4),
        "mimo2": Window(0),
        "modern-bert": Window(3, dense_first=True),
        "muse-glimmer": Window(4),
        "olmo2": Window(4),
        "plamo3": Window(8),
        "smallthinker": Window(4, dense_first=True, is_fixed=True, tokens=4096),
        "spark2_5": Window(0),
        "step35": Window(0),
    }
)
"""Others ignore a window in the file, or slide by other rules (lfm2: every layer with keys)."""

SMALL_EXAONE_LAYERS: Final = 64
"""exaone4 slides only in its large model, which has this many layers."""

RECURRENT: Final = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
"""Every layer has a state and none has keys."""

RECURRENT_WITHOUT_KEYS: Final = frozenset(
    {"bailingmoe3", "granitehybrid", "jamba", "kimi-k3", "kimi-linear", "lfm2", "lfm2moe", "plamo2"}
)
"""A layer is recurrent when it has no heads of keys."""

RECURRENT_BY_INTERVAL: Final[Mapping[str, int]] = MappingProxyType(
    {"minimax-01": 8, "qwen35": 4, "qwen35moe": 4, "qwen3next": 4}
)
"""All layers but each nth are recurrent, unless the file lists them."""

RECURRENT_WITHOUT_FEED_FORWARD: Final = frozenset({"nemotron_h", "nemotron_h_moe"})
"""A layer is either a feed-forward one, or recurrent when it has no heads of keys."""

RECURRENT_AND_ATTENDING: Final = frozenset({"falcon-h1"})
"""Every layer has a state and keys."""

WITHOUT_MEMORY: Final = frozenset(
    {
        "bert",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
        "wavtokenizer-dec",
    }
)
"""They read everything at once and keep nothing."""

ROUGH: Final = frozenset(
    {
        "deepseek32",
        "deepseek4",
        "dflash",
        "dots3note",
        "eagle3",
        "gemma4-assistant",
        "glm-dsa",
        "glm5-next",
        "graniteswitch",
        "hy_v4",
        "kimi-k3",
        "minimax-m3",
        "qwen4exp",
        "t5",
        "t5encoder",
    }
)
"""llama.cpp keeps more for these than the general rules say: indices of sparse attention, a second cache."""

_GENERAL: Final = """
afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom chameleon
chatglm codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2 deepseek2-ocr dots1 dream
ernie4_5 ernie4_5-moe eurobert exaone exaone-moe exaone4 falcon falcon-h1 gemma gemma-embedding gemma2 gemma3
gemma3n gemma4 glm4 glm4moe gpt-oss gpt2 gptj gptneox granite granite_swa granitehybrid granitemoe grok
grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais jais2 jamba jina-bert-v2
jina-bert-v3 kimi-linear laguna lfm2 lfm2moe llada llada-moe llama llama-embed llama4 maincoder mamba mamba2
maple mellum mimo2 minicpm minicpm3 minimax-01 minimax-m2 mistral3 mistral4 modern-bert mpt muse-glimmer
nanbeige nemotron nemotron_h nemotron_h_moe neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe openelm orion
paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm qwen qwen2 qwen2moe qwen2vl qwen3 qwen35
qwen35moe qwen3moe qwen3next qwen3vl qwen3vlmoe refact rnd1 rwkv6 rwkv6qwen2 rwkv7 seed_oss smallthinker
smollm3 spark2_5 stablelm starcoder starcoder2 step35 talkie wavtokenizer-dec xverse
"""
GENERAL: Final = frozenset(_GENERAL.split())
"""The architectures that the rules of this package are those of llama.cpp for."""
