"""`moekit fit --memory --speed`: a model may be larger than its memory as long as paging it is fast enough."""

from commanding import call


def test_what_paging_allows_is_the_budget(model, profile):
    code, out, _ = call(
        "fit", model, "--memory", "150KB", "--context", 8, "--speed", 1, "--profile", profile, "--dry-run"
    )
    assert code == 0
    assert out.startswith("Paging: ")
    assert "tokens/s at most" in out or "not needed" in out


def test_bad_input(refused, model, profile):
    refused(
        "fit", model, "--size", "1MB", "--speed", 5, "--profile", profile, "--dry-run", naming="give --memory with it"
    )
    refused(
        "fit", model, "--memory", "1MB", "--context", 8, "--speed", -1, "--profile", profile, "--dry-run",
        naming="give one above 0",
    )  # fmt: skip
