"""Texts that are longer than the text encoder takes are counted and named; short ones are not even tokenized."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from chroma_trainer.trainer_core.config.validation import ValidationConfig
from chroma_trainer.trainer_core.setup.caption_check import check_texts, describe_dataset
from chroma_trainer.trainer_core.setup.long_texts import LongTexts, watch_lengths
from chroma_trainer.trainer_core.train.prepare import plan_run

from tests.train.test_prepare import with_captions

LONG = "a red cat sitting on the mat, " * 60


def test_only_texts_that_may_be_too_long_are_tokenized():
    counted, long = [], LongTexts(10)

    def count(text):
        counted.append(text)
        return len(text)

    texts = [("a", "x" * 8), ("b", "x" * 9), ("b", "x" * 12), ("b", "x" * 11), ("c", "x" * 30)]
    assert list(watch_lengths(texts, long, count)) == [text for _, text in texts]
    assert len(counted) == 4 and (long.count, long.names, long.longest) == (3, ["b", "c"], 30)
    assert long.describe("captions") == (
        "captions longer than the 10 tokens that the text encoder takes: 3; what is beyond is cut off. The longest has "
        "30 tokens. b, c"
    )
    assert LongTexts(10).describe("captions") == ""


def test_the_limit_is_the_encoders(tiny_model, tiny_flux_model):
    """As many tokens as the encoder itself keeps: one more is cut."""
    from chroma_trainer.trainer_core.models.text import t5 as text_encoder

    assert tiny_model.text_tokens == text_encoder.MAX_TOKENS and tiny_flux_model.text_tokens == 24
    fits, too_long = "q" * 22, "q" * 23  # letters that are a token each, with the space in front and the end token
    for text, count in ((fits, 0), (too_long, 1)):
        _, long = check_texts([("a.png", text)], tiny_flux_model)
        assert (long.count, long.limit) == (count, 24)


def test_the_run_reports_them(workshop, tmp_path):
    dataset = with_captions(workshop, tmp_path / "pictures", _0=LONG, _1=f"{LONG}\na cat")
    host = workshop.host()
    request = replace(workshop.request(ValidationConfig(prompts=LONG, cfg=1.0)), dataset=dataset)
    report = plan_run(request, host).index.report["long_captions"]
    assert (report["count"], report["limit"]) == (2, 512) and report["longest"] > 512
    assert [name.endswith(end) for name, end in zip(report["images"], ("0.png", "1.png"), strict=True)] == [True] * 2
    assert any("captions longer than the 512 tokens that the text encoder takes: 2;" in text for text in host.told())
    assert any("prompts longer than the 512 tokens" in text for text in host.told())


def test_check_names_them_and_the_files_that_are_left_out(workshop, tmp_path):
    dataset = with_captions(workshop, tmp_path / "pictures", _0=LONG)
    (tmp_path / "pictures" / "x.heic").write_bytes(b"x")
    (tmp_path / "pictures" / "1.txt").write_bytes(bytes(range(256)))
    (tmp_path / "pictures" / "@eaDir").mkdir()
    (tmp_path / "pictures" / "@eaDir" / "t.jpg").write_bytes(b"x")
    left_out, binary, unreadable, long = describe_dataset(replace(workshop.request(), dataset=dataset))
    assert left_out.startswith("left out 1 images: thumbnails of a Synology NAS")
    assert unreadable.endswith("x.heic: reading HEIC needs a package; run pip install pillow-heif, or pip install "
                               '"chroma-trainer[formats]"')  # fmt: skip
    assert binary.startswith("can't be used: ") and "1.png: its caption file 1.txt contains NUL bytes" in binary
    assert long.startswith("captions longer than the 512 tokens")


@pytest.mark.parametrize("module", ["setup.caption_check", "setup.part_check"])
def test_checks_do_without_torch(module):
    code = f"import sys, chroma_trainer.trainer_core.{module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
