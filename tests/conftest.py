"""What every test shares: Hypothesis's profile, torch's threads, the imitated GPU, and data that may be absent."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import hypothesis
import numpy
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # processes side by side: none may spin on another's core
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined: without a GPU the interpreter runs them
    from imitation import imitated_gpu  # which takes private parts of torch: no GPU's tests are to need them

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")
torch.set_num_threads(2)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure():
    """One sentence in place of the failure of every kernel."""
    with suppress(ImportError):
        import triton

        newer = numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
        if newer and triton.__version__.startswith("3.6.") and triton.knobs.runtime.interpret:
            raise pytest.UsageError(
                f"the interpreter of Triton {triton.__version__} fails on numpy {numpy.__version__}, so that no kernel "
                "can be tested without a GPU: pip install 'numpy<2.4'"
            )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if only := item.get_closest_marker("gpu_only"):
            (reason,) = only.args
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA GPU: {reason}"))


@pytest.fixture(autouse=True)
def gpu(request):
    """For a test marked ``gpu``, where there is no GPU: the imitation. It is set up after what a module shares."""
    if torch.cuda.is_available() or not request.node.get_closest_marker("gpu"):
        yield None
        return
    with imitated_gpu() as machine:
        yield machine


@pytest.fixture(scope="session")
def shared_data():
    """The folder of data that is not part of the repository; its README.md describes it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A folder with a random byte-level Qwen2-MoE: 2 layers, 8 experts, 2 used."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = transformers.Qwen2MoeForCausalLM(config).bfloat16()
    for name, weight in model.named_parameters():
        if name.endswith("mlp.gate.weight"):  # transformers initialises routers to zero: all would tie
            torch.nn.init.normal_(weight)
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    model.save_pretrained(path)
    return path
