"""An address in, the samples that a Prometheus server would find there out."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

Labels = tuple[tuple[str, str], ...]


class Scrape:
    """One scrape: samples by their whole name and their labels."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = {family.name: family for family in families}
        self.samples: dict[tuple[str, Labels], float] = {}
        for family in self.families.values():
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                assert key not in self.samples, f"{key} is there twice"
                self.samples[key] = sample.value

    def get(self, name: str, default: float | None = None, **labels: str) -> float:
        """The sample with exactly *labels*; without a default it must be there."""
        key = name, tuple(sorted(labels.items()))
        return self.samples[key] if default is None else self.samples.get(key, default)

    def label_values(self, label: str) -> set[str]:
        return {dict(labels)[label] for _, labels in self.samples if label in dict(labels)}

    def cumulative(self) -> dict[tuple[str, Labels], float]:
        """What may never go down."""
        return {
            key: value
            for key, value in self.samples.items()
            if key[0].endswith(("_total", "_bucket", "_count", "_sum"))
        }

    def check_histograms(self) -> None:
        """Buckets grow from bound to bound, and the last has what the count says."""
        for family in self.families.values():
            if family.type != "histogram":
                continue
            buckets: dict[Labels, list[float]] = {}
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    labels = tuple(sorted(pair for pair in sample.labels.items() if pair[0] != "le"))
                    buckets.setdefault(labels, []).append(sample.value)
            for labels, counts in buckets.items():
                assert counts == sorted(counts)
                assert counts[-1] == self.samples[family.name + "_count", labels]


def parse(text: str, *, openmetrics: bool = False) -> Scrape:
    return Scrape(parse_openmetrics(text) if openmetrics else parse_text(text))


def scrape(address: str, headers: Mapping[str, str] | None = None) -> Scrape:
    """GET http://ADDRESS/metrics, as Prometheus asks for it."""
    headers = headers or {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    with urllib.request.urlopen(
        urllib.request.Request(f"http://{address}/metrics", headers=headers)
    ) as answer:
        is_openmetrics = answer.headers["Content-Type"].startswith("application/openmetrics-text")
        return parse(answer.read().decode(), openmetrics=is_openmetrics)


def scrape_until(address: str, holds: Callable[[Scrape], bool], patience_s: float = 30.0) -> Scrape:
    """Scrape again until what is asked for *holds*: counts follow their answers by microseconds."""
    end = time.monotonic() + patience_s
    while True:
        found = scrape(address)
        if holds(found):
            return found
        assert time.monotonic() < end, sorted(found.samples.items())
        time.sleep(0.02)
