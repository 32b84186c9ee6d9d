"""`sglang-apb doctor --compare`: what another SGLang has changed of what the plugin depends on is found and named."""

from __future__ import annotations

import re
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from sglang_apb.patches import row_chunks

import sglang_apb
from sglang_apb import cli
from sglang_apb.commands import compare, targets
from sglang_apb.commands.source_tree import Tree

SITE_PACKAGES = Path(find_spec("sglang").origin or "").parents[1]  # type: ignore[union-attr]
FILES = (
    *("srt/server_args.py", "srt/models/llama.py", "srt/models/qwen2.py", "srt/disaggregation/utils.py"),
    *("srt/disaggregation/base", "srt/disaggregation/common"),
)
FORWARD = "sglang.srt.models.llama.LlamaMLP.forward"
BASE_SENDER = "sglang.srt.disaggregation.base.conn.BaseKVSender"
SENDER = "sglang.srt.disaggregation.common.conn.CommonKVSender"
BOUNDS = "sglang.srt.disaggregation.utils._get_cp_rank_page_bounds"


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the part of SGLang that one of our patch modules and one of our classes depend on, and only they
    are compared.
    """
    for name in FILES:
        source, copy = SITE_PACKAGES / "sglang" / name, tmp_path / "sglang" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    sender = Path(sglang_apb.__file__).parent / "transfer" / "sglang" / "sender.py"
    monkeypatch.setattr(targets, "patch_modules", lambda: [("row_chunks", row_chunks.PATCHES)])
    ours = targets.OurFile.read("sglang_apb/transfer/sglang/sender.py", sender)
    monkeypatch.setattr(targets, "our_files", lambda: [ours])
    return tmp_path


def edit(folder: Path, path: str, old: str, new: str) -> None:
    """Replaces the first `old` in the source of `path`, a function of the copy in `folder`."""
    found = Tree(folder).find(path)
    assert found is not None
    file, source = folder / found.module.file, "\n".join(found.lines)
    text = file.read_text()
    assert text.count(source) == 1 and old in source
    file.write_text(text.replace(source, source.replace(old, new, 1)))


def doctor(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str]]:
    """Exit status and output of a comparison with `path`."""
    return cli.main(["doctor", "--compare", str(path), *options]), capsys.readouterr().out.splitlines()


def row(lines: list[str], path: str) -> str:
    """What the table says of a target, which more than one patch may have."""
    name = re.escape(path.removeprefix("sglang.srt."))
    matches = (re.fullmatch(rf"  (\w[\w ]*?) +{name}(?: (.*))?", line) for line in lines)
    (found,) = {match.groups() for match in matches if match}
    return " ".join(filter(None, found))


def test_the_installed_sglang_equals_itself_in_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = doctor(SITE_PACKAGES, capsys)
    rows = [line for line in lines if line.startswith("  ")]
    assert status == 0 and all(line.startswith("  equal ") for line in rows)
    assert lines[-1] == f"{len(rows)} targets: {len(rows)} equal"
    for name, patches in targets.patch_modules():
        assert f"patches/{name}.py" in lines
        for patch in patches:
            # `TransferBackend._missing_` is Python's: the table has the class.
            assert row(lines, patch.target.removesuffix("._missing_")) == "equal"
    for module in ("bootstrap", "manager", "receiver", "sender"):
        assert f"sglang_apb/transfer/sglang/{module}.py" in lines
    assert row(lines, f"{SENDER}._check_bootstrap_timeout") == "equal", "our sender calls it, and does not override it"


def test_comments_docstrings_and_formatting_change_nothing(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(other, FORWARD, "):\n", '):  # what a layer does\n        """Anew."""\n\n')
    edit(other, FORWARD, " = ", "   =  ")
    assert doctor(other, capsys) == doctor(SITE_PACKAGES, capsys)


def test_a_changed_body_is_told_and_fits(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(other, FORWARD, "):\n", "):\n        x = 2 * x\n")
    status, lines = doctor(other, capsys)
    assert status == 0 and row(lines, FORWARD) == "source changed"
    assert lines[-1].endswith(" equal, 1 changed in source") and not any("2 * x" in line for line in lines)
    _, lines = doctor(other, capsys, "--diff")
    assert [line for line in lines if line.startswith(("+", "-"))][2:] == ["+        x = 2 * x"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("self,", "self, rows,", "(...) -> (..., rows, ...)"),
        ("forward_batch=None", "batch=None", "(..., forward_batch=) -> (..., batch=)"),
        ("forward_batch=None", "forward_batch", "(..., forward_batch=) -> (..., forward_batch)"),
        ("def", "async def", "(...) -> (async, ...)"),
        ("    def", "    @staticmethod\n    def", "(...) -> (staticmethod, ...)"),
    ],
)
def test_a_changed_signature_does_not_fit(
    other: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, told: str
) -> None:
    edit(other, FORWARD, old, new)
    status, lines = doctor(other, capsys)
    assert status == 1 and row(lines, FORWARD) == f"signature changed {told}"
    assert lines[-1].endswith(" equal, 1 in signature")


def test_a_parameter_s_type_and_its_default_are_source(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(other, FORWARD, "forward_batch=None", "forward_batch: object = 0")
    status, lines = doctor(other, capsys)
    assert status == 0 and row(lines, FORWARD) == "source changed"


def test_what_is_gone_is_looked_for(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(other, FORWARD, "def forward", "def run")
    edit(other, BOUNDS, "def ", "def former")
    (other / "sglang/srt/disaggregation/pages.py").write_text("def _get_cp_rank_page_bounds(): ...")
    status, lines = doctor(other, capsys)
    assert status == 1 and row(lines, FORWARD).startswith("gone")
    assert row(lines, BOUNDS) == "gone (_get_cp_rank_page_bounds is defined in sglang.srt.disaggregation.pages)"
    assert lines[-1].endswith(" equal, 2 gone")
    first = lines[lines.index("sglang_apb/transfer/sglang/sender.py") + 1]
    assert first.startswith("  gone"), "what needs a look comes first"


def test_a_class_that_is_gone_is_looked_for(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = other / "sglang/srt/disaggregation/common/conn.py"
    file.rename(file.with_name("sender.py"))
    status, lines = doctor(other, capsys)
    assert status == 1
    assert row(lines, f"{SENDER}.poll") == (
        "gone (CommonKVSender is defined in sglang.srt.disaggregation.common.sender)"
    )


def test_a_method_that_moved_to_a_base_is_found(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(other, f"{SENDER}.poll", "def poll", "def former_poll")
    status, lines = doctor(other, capsys)
    assert status == 0 and row(lines, f"{SENDER}.poll") == "source changed"


def test_names_are_found_as_python_finds_them(tmp_path: Path) -> None:
    (tmp_path / "sglang/srt").mkdir(parents=True)
    (tmp_path / "sglang/srt/server_args.py").write_text(
        "class Base:\n    def poll(self): ...\n    def send(self): ...\n"
        "class Left(Base):\n    def send(self): ...\n"
        "class Right(Base):\n    def poll(self): ...\n    def send(self): ...\n"
        "@overload\ndef load(path: str): ...\ndef load(path): return path\n"
    )
    tree, module = Tree(tmp_path), "sglang.srt.server_args"
    found = [tree.find_method([f"{module}.Left", f"{module}.Right"], name) for name in ("poll", "send")]
    assert [method.qualname for method in found if method] == ["Right.poll", "Left.send"]
    load = tree.find(f"{module}.load")
    assert load is not None and load.lines == ["def load(path): return path"]


def test_methods_that_a_class_of_ours_is_not_ready_for_are_told(
    other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(other, f"{BASE_SENDER}.get_transfer_metric", "    @", "    @abstractmethod\n    def drain(self): ...\n\n    @")
    edit(other, f"{SENDER}.poll", "    def", "    def set_owned_pages(self): ...\n\n    def")
    status, lines = doctor(other, capsys)
    assert status == 1 and lines[-1].endswith(" equal, 2 new")
    assert row(lines, f"{BASE_SENDER}.drain") == "new (abstract, and ours does not define it)"
    assert row(lines, f"{SENDER}.set_owned_pages") == "new (ours has the same name)"


def test_a_function_that_the_installed_sglang_lacks_is_told_once(
    other: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = other / "ours.py"
    ours.write_text("from sglang.srt.models import llama\nllama.no_such()\nllama.no_such()\n")
    monkeypatch.setattr(targets, "our_files", lambda: [targets.OurFile.read("sglang_apb/ours.py", ours)])
    status, lines = doctor(other, capsys)
    assert status == 1 and row(lines, "sglang.srt.models.llama.no_such") == "gone (not in the installed SGLang)"


def test_a_wheel_and_the_package_itself_are_read_alike(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(other, FORWARD, "self,", "self, rows,")
    edit(other, BOUNDS, "def ", "def former")
    wheel = other / "sglang-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in (other / "sglang").rglob("*.py"):
            archive.write(file, file.relative_to(other))
    status, lines = doctor(other, capsys, "--diff")
    assert status == 1
    assert doctor(other / "sglang", capsys, "--diff") == doctor(wheel, capsys, "--diff") == (status, lines)


def test_the_other_sglang_is_not_run(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (other / "sglang").rglob("*.py"):
        file.write_text(file.read_text() + "\nraise SystemExit('imported')\n")
    assert doctor(other, capsys)[0] == 0


def test_source_of_a_newer_python_is_said_to_be_that(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = other / "sglang/srt/models/llama.py"
    file.write_text(f"{file.read_text()}\ndef of a newer Python\n")
    assert cli.main(["doctor", "--compare", str(other)]) == 1
    assert "sglang/srt/models/llama.py:" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "folder", "text", "zip"])
def test_what_holds_no_sglang_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "there"
    if content == "folder":
        (path / "sglang").mkdir(parents=True)
    elif content == "text":
        path.write_text("no wheel")
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("torch/__init__.py", "")
    with pytest.raises(SystemExit) as error:
        cli.main(["doctor", "--compare", str(path)])
    assert error.value.code == 2
    assert f"{path} is neither a wheel of SGLang nor a folder with sglang/: get one" in capsys.readouterr().err


def test_only_the_known_sglang_is_compared_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "SGLANG_VERSION", "0.1.2")
    assert cli.main(["doctor", "--compare", str(SITE_PACKAGES)]) == 1
    assert "--compare starts from SGLang 0.1.2" in capsys.readouterr().err


def test_a_diff_needs_something_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--diff"]) == 1
    assert "--diff needs --compare" in capsys.readouterr().err
