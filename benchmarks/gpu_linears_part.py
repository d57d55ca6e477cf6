"""`benchmarks.gpu_linears` as a part: a model's layers in the dtype that it is served in.

What is measured goes where the engine looks for timings when it starts, so that the parts behind
this one do not measure it again, and into OUT/tuned, the file to be committed for such a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch

from benchmarks.gpu_linears import Product, measure, measure_limits, timings_of
from benchmarks.gpu_parts import Case, Figures, Part
from models.awq.backends import BACKENDS
from models.awq.backends.choice import ROWS
from models.awq.backends.timings import Environment, Layers, Timings, write

MODELS = (
    ("7B", "float16"), ("3B", "bfloat16"), ("7B", "bfloat16"), ("13B", "float16"),
    ("3B", "float16"), ("13B", "bfloat16"),
)  # fmt: skip
"""LLaVA's are in fp16, VILA's in bf16."""
SHOWN_ROWS = (1, 8, 64, 512, 4096)


class LinearsPart(Part):
    name = "linears"
    seconds = 180.0

    def cases(self) -> Mapping[str, Case]:
        models = MODELS if self.setting.scale == "full" else (("small", "bfloat16"),)
        return {
            f"{model}, {dtype}": lambda model=model, dtype=dtype: self._measure(model, dtype)
            for model, dtype in models
        }

    def lines(self, cases: Mapping[str, Figures]) -> Iterator[str]:
        yield "Microseconds (share of the limit, %):"
        yield ""
        yield "| layer | backend | " + " | ".join(f"{rows} rows" for rows in SHOWN_ROWS) + " |"
        yield "|---|---|" + "---:|" * len(SHOWN_ROWS)
        for name, figures in cases.items():
            by_arm: dict[tuple[str, str], dict[int, Figures]] = {}
            for product in figures["products"]:
                arm = (product["layer"], product["backend"])
                by_arm.setdefault(arm, {})[product["rows"]] = product
            for (layer, backend), by_rows in by_arm.items():
                cells = (
                    f"{own['microseconds']:.1f} ({own['share'] * 100:.0f})"
                    if (own := by_rows.get(rows)) else "-"
                    for rows in SHOWN_ROWS
                )  # fmt: skip
                yield f"| {name}, {layer} | {backend} | " + " | ".join(cells) + " |"

    @torch.inference_mode()
    def _measure(self, model: str, dtype: str) -> Figures:
        device, kind = self.setting.device, getattr(torch, dtype)
        rows = ROWS if self.setting.scale == "full" else ROWS[::4]
        backends = {name: BACKENDS[name] for name in BACKENDS}
        limits = measure_limits(device, kind)
        products: list[Product] = []
        for product in measure([model], rows, device, kind, backends, limits):
            if products and product.layer != products[-1].layer:
                self._keep(products)
                print(f"  {model}, {dtype}: {products[-1].layer} is done", flush=True)
            products.append(product)
        self._keep(products)
        return {"limits": asdict(limits), "products": [asdict(product) for product in products]}

    def _keep(self, products: list[Product]) -> None:
        if not self.setting.is_gpu:
            return
        environment = Environment.of(self.setting.device)
        kept = Timings.load(environment)
        _merge(kept.layers, timings_of(products))
        kept.save()
        write(self.setting.out / "tuned" / environment.file_name, environment, kept.layers)


def _merge(layers: Layers, new: Layers) -> None:
    for key, by_rows in new.items():
        layers.setdefault(key, {}).update(by_rows)
