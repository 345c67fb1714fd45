"""Run by torchrun: weight rounds under a layout, and who keeps what. Arguments: results, TP and PP sizes, models."""

import json
import os
import sys
from itertools import product
from pathlib import Path

import torch

from megarl.config import LearnerConfig
from megarl.learner.mesh import Mesh
from megarl.learner.model import build_model, transformer_config
from megarl.learner.weights import WeightStream, load_hf_weights
from megarl.models.family import architecture, read_hf_config
from megarl.models.hugging_face import HuggingFaceFiles


def main() -> None:
    out, layouts, *folders = sys.argv[1:]
    results = {}
    for (tp, pp), folder in product(json.loads(layouts), folders):
        hf_config = read_hf_config(folder)
        arch, files, family = architecture(hf_config), HuggingFaceFiles(folder), Path(folder).name
        config = LearnerConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        mesh = Mesh(config)
        model = build_model(hf_config, transformer_config(hf_config, config, "fp32"), mesh)
        load_hf_weights(model, arch, mesh, folder)
        stream = WeightStream(model, arch, mesh)
        for keepers in ({0}, {0, 1, 2, 3}, {0, 3}):
            rounds, right = [], True
            for part in stream.rounds(300_000, keepers):
                tensors = list(part)
                right = right and all(torch.equal(tensor, files[name]) for name, tensor in tensors)
                rounds.append([name for name, _ in tensors])
            results[f"{family} {tp} {pp} {sorted(keepers)}"] = mesh.gather(rounds), all(mesh.gather(right))
        on_rank_0 = [(name, torch.equal(tensor, files[name])) for name, tensor in stream.tensors()]
        results[f"{family} {tp} {pp}"] = mesh.gather([name for name, equal in on_rank_0 if equal])
        mesh.close(last=False)
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
