"""For all tests: what a machine without a GPU leaves out, hypothesis's examples, kernels under the interpreter, and
what tests of several folders use: small language models, recall in mixed lengths, a mamba_ssm without its extension.

In CI a property has the examples that its test says, in the nightly mode (CHELA_NIGHTLY=1) 2,000.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

sys.path.append(str(Path(__file__).parent))  # for what tests share

NIGHTLY_EXAMPLES = 2_000
LM_MIXERS = [  # the built-in mixers that decode, with their defaults
    "chela",
    "attention",
    "linear_attention",
    "gla",
    "retnet",
    "mamba",
    "mamba2",
    "gated_deltanet",
    "conv",
]
INTERPRETED_SECONDS = {"ci": 900, "nightly": 4 * 3600}  # for one file; an interpreted example takes about a second

settings.register_profile("ci", max_examples=100, deadline=None)
settings.register_profile("nightly", max_examples=NIGHTLY_EXAMPLES, deadline=None, print_blob=True)
settings.load_profile("nightly" if os.environ.get("CHELA_NIGHTLY") == "1" else "ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device; nightly, a test's own `max_examples` gives way to the profile's."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device (make test-gpu refuses to run without)"))
    nightly = settings.get_current_profile_name() == "nightly"
    for item in items if nightly else ():
        test = getattr(item, "obj", None)
        test = getattr(test, "__func__", test)  # a method's settings stand on its function
        own = getattr(test, "_hypothesis_internal_use_settings", None)
        if own is not None and own.max_examples < NIGHTLY_EXAMPLES:
            test._hypothesis_internal_use_settings = settings(own, max_examples=NIGHTLY_EXAMPLES)
        elif own is None and getattr(test, "is_hypothesis_test", False):
            raise pytest.UsageError(f"{item.nodeid}: hypothesis keeps a test's settings elsewhere in this version")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What asks for `lm_mixer` runs for each of LM_MIXERS, and of MORE_MIXERS where its file has them."""
    if "lm_mixer" in metafunc.fixturenames:
        metafunc.parametrize("lm_mixer", [*LM_MIXERS, *getattr(metafunc.module, "MORE_MIXERS", ())], scope="module")


@pytest.fixture(scope="session")
def small_lm() -> Callable[..., Any]:
    """`small_lm("gla", num_hidden_layers=1)`: a seeded language model of 61 tokens in eval mode, the rest as asked for.

    `apart=True` makes its logits differ enough that no tie decides which token is greedy.
    """

    def build(mixer: str = "attention", *, apart: bool = False, **changes: Any) -> Any:
        import torch

        from chela_plugin.lm import ChelaConfig, ChelaForCausalLM

        sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
        torch.manual_seed(0)
        model = ChelaForCausalLM(ChelaConfig(mixer=mixer, **{**sizes, **changes})).eval()
        if apart:
            with torch.no_grad():
                for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
                    weight.mul_(20)
        return model

    return build


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models as small as those of tests only wait for each other's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recall(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """MQAR's training examples as the file's MIXTURE, in the task's own words, has them."""
    from chela_plugin.harness.config import load_task
    from chela_plugin.harness.tasks import SPLITS, examples

    words = ["vocabulary=2048", *(f"{split}={request.module.MIXTURE}" for split in SPLITS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHELA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield examples(load_task("mqar", words), "train")


@pytest.fixture
def mamba_ssm_without_extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """`import mamba_ssm` needs a CUDA extension that isn't there; its Triton kernels, here one in name only, don't."""
    triton = tmp_path / "mamba_ssm" / "ops" / "triton"
    triton.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda")
    (triton / "ssd_combined.py").write_text("def mamba_chunk_scan_combined(): return 'scan'")
    monkeypatch.syspath_prepend(str(tmp_path))

    def take_out() -> dict[str, Any]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "mamba_ssm"}

    before = take_out()
    yield
    take_out()  # else a later first import of fla finds parts of a package that isn't there
    sys.modules.update(before)


@pytest.fixture
def this_file_under_the_interpreter(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Runs the test's file once more in a process with TRITON_INTERPRET=1; Triton decides at its first import."""

    def run() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
        environment.pop("CHELA_BACKEND", None)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-p", "interpreted_memory", str(request.path)]
        timeout = INTERPRETED_SECONDS[settings.get_current_profile_name()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

    return run
