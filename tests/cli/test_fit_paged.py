"""`moekit fit --memory --speed`: a model may be larger than its memory as long as paging it is fast enough."""

import json

from commanding import call


def test_what_paging_allows_is_the_budget(model, profile):
    code, out, _ = call(
        "fit", model, "--memory", "150KB", "--context", 8, "--speed", 1, "--profile", profile, "--dry-run"
    )
    assert code == 0
    assert out.startswith("Paging: ")
    assert "tokens/s at most" in out or "not needed" in out


def test_json_says_what_was_weighed(model, profile):
    words = ["fit", model, "--context", 8, "--speed", 1, "--profile", profile, "--dry-run", "--json"]
    code, out, _ = call(*words, "--memory", "150KB")
    found = json.loads(out)
    paging = found["paging"]
    assert code == 0
    assert paging["bytes"] == found["budget"]["bytes"]
    assert paging["experts_in_memory"] < paging["experts"]
    assert paging["tokens_per_second"] >= 1
    assert paging["disk_bytes_per_second"] > 0
    plenty = json.loads(call(*words, "--memory", "1GB")[1])["paging"]
    assert plenty["tokens_per_second"] is None
    assert plenty["experts_in_memory"] == plenty["experts"]


def test_json_says_nothing_of_paging_that_was_not_asked_for(model, profile):
    code, out, _ = call("fit", model, "--ratio", 0.3, "--profile", profile, "--dry-run", "--json")
    assert (code, json.loads(out)["paging"]) == (0, None)


def test_bad_input(refused, model, profile):
    refused(
        "fit", model, "--size", "1MB", "--speed", 5, "--profile", profile, "--dry-run", naming="give --memory with it"
    )
    refused(
        "fit", model, "--memory", "1MB", "--context", 8, "--speed", -1, "--profile", profile, "--dry-run",
        naming="give one above 0",
    )  # fmt: skip
