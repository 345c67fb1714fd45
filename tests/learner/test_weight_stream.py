"""The learner's weights in rounds: every tensor once, whole layers at a time, on the ranks that are to pack them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from megarl.models.family import architecture, read_hf_config
from megarl.models.weights import hf_names

pytestmark = pytest.mark.processes

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]  # TP, PP of four ranks
KEEPERS = [[0], [0, 1, 2, 3], [0, 3]]


@pytest.fixture(params=["qwen2", "llama"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def results(qwen2, llama, run_ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "results.json"
    run_ranks(Path(__file__).with_name("weight_stream_ranks.py"), 4, out, json.dumps(LAYOUTS), qwen2, llama)
    return json.loads(out.read_text())


def layer_of(name):
    match = re.match(r"model\.layers\.\d+\.", name)
    return match[0] if match else name


@pytest.mark.parametrize("keepers", KEEPERS, ids=str)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_rounds_bring_every_tensor_once_to_its_keeper_in_whole_layers(results, model, tp, pp, keepers):
    ranks, right = results[f"{model.name} {tp} {pp} {keepers}"]
    assert right and len({len(rounds) for rounds in ranks}) == 1
    names = hf_names(architecture(read_hf_config(str(model))))
    assert Counter(name for rounds in ranks for part in rounds for name in part) == Counter(names)
    where = {
        (layer_of(name), rank, i) for rank, rounds in enumerate(ranks) for i, part in enumerate(rounds) for name in part
    }
    assert len(where) == len({layer for layer, _, _ in where}), "a layer is cut"
    keeping = {rank for _, rank, _ in where}
    assert keeping <= set(keepers)
    if len(keepers) == 4:
        assert len(keeping) == 4 // tp, "some stage or replica has its tensors sent by another"


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_rank_0_can_have_them_all_in_the_order_of_the_stages(results, model, tp, pp):
    on_rank_0, *others = results[f"{model.name} {tp} {pp}"]
    assert on_rank_0 == results[f"{model.name} 1 1"][0] and not any(others)
    assert set(on_rank_0) == hf_names(architecture(read_hf_config(str(model))))
