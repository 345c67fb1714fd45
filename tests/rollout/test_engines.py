"""One real vLLM engine per model serves the whole module; every test leaves it with complete weights or repairs it."""

import asyncio
import json
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from dealing import learn, score
from faults import FAULTS
from safetensors.torch import save_file

from megarl.config import parse_config
from megarl.models.weights import manifest
from megarl.rollout.messages import Request, Sampling
from megarl.rollout.pool import RolloutError, RolloutPool
from megarl.rollout.transfer import WeightTransferError

pytestmark = pytest.mark.processes

SLOTS = 5  # of the engine
SAMPLING = Sampling(temperature=2.0, top_p=1.0, top_k=0, max_tokens=16)


GENERATION = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 5.0, "max_new_tokens": 2}


@pytest.fixture(scope="module", params=["qwen2", "llama"])  # llama: tied embeddings
def config(request, tmp_path_factory):
    """A model with what must not change how it is read and sampled: its own habits, another format's files."""
    model = shutil.copytree(request.getfixturevalue(request.param), tmp_path_factory.mktemp("model") / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **GENERATION}))
    (model / "params.json").write_text("{}")
    save_file({}, model / "consolidated.safetensors")
    return parse_config(
        {
            "model": {"path": str(model)},
            "data": {"train": "arithmetic", "max_prompt_tokens": 200},
            "learner": {"micro_batch_tokens": 4096},
            "rollout": {"max_response_tokens": 16, "temperature": 2.0, "bucket_mib": 1, "max_sequences": SLOTS},
            "optim": {"lr": 0.01},
        }
    )


@pytest.fixture(scope="module")
def learner(config):
    from megarl.learner.learner import Learner
    from megarl.learner.mesh import Mesh
    from megarl.models.family import read_hf_config

    mesh = Mesh(config.learner)
    yield Learner(config, config.recipe, read_hf_config(config.model.path), mesh, temperature=SAMPLING.temperature)
    mesh.close(last=False)


@pytest.fixture(scope="module")
def pool(config, learner, tmp_path_factory):
    with RolloutPool(config, tmp_path_factory.mktemp("logs"), manifest(learner.arch)) as pool:
        yield pool


def long_prompts(count: int) -> list[list[int]]:
    """Prompts of over 128 tokens with a common prefix, which a stale prefix cache would answer from."""
    generator = np.random.default_rng(0)
    prefix = generator.integers(2, 50, 150).tolist()
    return [[*prefix, *generator.integers(2, 50, 8 + i).tolist()] for i in range(count)]


def responses(pool, count=6, seed=0):
    requests = [Request(prompt, seed=seed + i) for i, prompt in enumerate(long_prompts(count))]
    return requests, pool.run(pool.generate(requests, SAMPLING))


def batch_of(requests, answers):
    from megarl.batch import build_demonstration_batch

    return build_demonstration_batch(
        [(np.array(r.prompt_ids), a.token_ids) for r, a in zip(requests, answers, strict=True)]
    )


def test_nothing_is_served_before_the_first_weights(pool):
    with pytest.raises(RolloutError, match="no complete weights"):
        responses(pool)


def test_learner_vllm_and_transformers_agree_before_and_after_updates(pool, learner, config, tmp_path):
    from transformers import AutoModelForCausalLM

    seen = []
    for version in range(3):
        pool.update_weights(learner.hf_weights(), version)
        requests, answers = responses(pool)
        assert all((answer.weight_versions == version).all() for answer in answers)
        batch = batch_of(requests, answers)
        scores, _ = score(learner, batch)
        by_learner = scores[batch.mask > 0]
        by_vllm = torch.from_numpy(np.concatenate([answer.logprobs for answer in answers]))
        learner.export(tmp_path / str(version))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(version), dtype=torch.float32)
        by_transformers = []
        for request, answer in zip(requests, answers, strict=True):
            ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
            logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / SAMPLING.temperature
            by_transformers.append(logits.log_softmax(-1).gather(-1, ids[0, len(request.prompt_ids) :, None])[:, 0])
        assert (by_learner - by_vllm).abs().max() < 1e-4
        assert (by_learner - torch.cat(by_transformers).detach()).abs().max() < 1e-4
        seen.append(by_vllm[:16])
        learn(learner, batch)
    assert (seen[0] - seen[1]).abs().max() > 1e-2, "the update changed nothing, so agreement after it proves nothing"


def test_a_response_arrives_when_it_is_finished_also_of_requests_that_came_later(pool, learner):
    pool.update_weights(learner.hf_weights(), 0)
    arrived = []

    def generating(prompt, tokens):
        sampling = replace(SAMPLING, max_tokens=tokens)
        return pool.start(pool.generate([Request(prompt, seed=0)], sampling, 1, lambda *_: arrived.append(tokens)))

    begun = [generating(prompt, tokens) for prompt, tokens in zip(long_prompts(2), (16, 2), strict=True)]
    assert [len(future.result()[0].token_ids) for future in begun] == [16, 2] and arrived == [2, 16]


def test_responses_keep_the_places_of_their_requests(pool, learner):
    pool.update_weights(learner.hf_weights(), 0)
    requests, arrived = [Request(prompt, seed=i) for i, prompt in enumerate(long_prompts(6))], {}
    answers = pool.run(pool.generate(requests, SAMPLING, 3, arrived.__setitem__))
    alone = [pool.run(pool.generate([request], SAMPLING))[0] for request in requests]
    for place, (answer, other) in enumerate(zip(answers, alone, strict=True)):
        assert arrived[place] is answer and (answer.token_ids == other.token_ids).all()


def test_a_request_that_an_engine_refuses_leaves_none_of_its_batch_behind(pool, learner):
    pool.update_weights(learner.hf_weights(), 0)
    requests, before = responses(pool)
    too_long = Request([2] * 4000, seed=0)
    with pytest.raises(RolloutError, match="4000"):
        pool.run(pool.generate([*requests, too_long], SAMPLING))
    _, after = responses(pool)
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(before, after, strict=True))


def test_equal_seeds_give_equal_samples_and_other_seeds_others(pool, learner):
    pool.update_weights(learner.hf_weights(), 0)
    first, again, other = (responses(pool, seed=seed)[1] for seed in (1, 1, 99))
    assert all(
        (a.token_ids == b.token_ids).all() and (a.logprobs == b.logprobs).all()
        for a, b in zip(first, again, strict=True)
    )
    assert any(
        len(a.token_ids) != len(b.token_ids) or (a.token_ids != b.token_ids).any()
        for a, b in zip(first, other, strict=True)
    )


def check_recovery(pool, learner, weights, version):
    """Nothing is served; then complete weights are taken, and are the learner's."""
    with pytest.raises(RolloutError, match="no complete weights"):
        responses(pool)
    pool.update_weights(weights, version)
    requests, answers = responses(pool)
    assert all((answer.weight_versions == version).all() for answer in answers)
    batch = batch_of(requests, answers)
    scores, _ = score(learner, batch)
    by_vllm = torch.from_numpy(np.concatenate([answer.logprobs for answer in answers]))
    assert (scores[batch.mask > 0] - by_vllm).abs().max() < 1e-4


def cut_in_layers(learner):
    """Its weights in two buckets, the first of which leaves layers unfinished."""
    return sorted(learner.hf_weights(), key=lambda item: item[0].endswith(("k_proj.weight", "up_proj.weight")))


def test_a_corrupted_bucket_is_refused_and_nothing_is_served_until_a_complete_update(pool, learner, a_flipped_byte):
    with a_flipped_byte(), pytest.raises(WeightTransferError, match=r"bucket 0 of update \d+ \(.* corrupted"):
        pool.update_weights(learner.hf_weights(), 7)
    check_recovery(pool, learner, learner.hf_weights(), 8)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bucket_that_is_lost_or_repeated_or_late_or_old_is_refused_by_name(pool, learner, in_transit, fault):
    change, said = FAULTS[fault]
    with in_transit(change), pytest.raises(WeightTransferError, match=said):
        pool.update_weights(cut_in_layers(learner), 7)
    check_recovery(pool, learner, cut_in_layers(learner), 8)


def test_a_missing_tensor_is_refused_by_name(pool, learner):
    kept = [(name, tensor) for name, tensor in learner.hf_weights() if name != "model.norm.weight"]
    with pytest.raises(WeightTransferError, match=r"model\.norm\.weight"):
        pool.update_weights(kept, 9)
    check_recovery(pool, learner, learner.hf_weights(), 10)


def test_a_tensor_that_was_not_announced_so_is_refused_by_name(pool, learner):
    for name, tensor, said in (
        ("stranger", torch.zeros(3), "never announced: stranger"),
        ("model.norm.weight", torch.zeros(3), r"model\.norm\.weight was announced as \[128\] and arrived as \[3\]"),
    ):
        with pytest.raises(WeightTransferError, match=said):
            pool.update_weights([(name, tensor)], 11)
    twice = [*learner.hf_weights(), *list(learner.hf_weights())[:1]]
    with pytest.raises(WeightTransferError, match="model.embed_tokens.weight arrived twice"):
        pool.update_weights(twice, 11)
    pool.update_weights(learner.hf_weights(), 12)


LONG = 40  # tokens of a response that is still being generated when a short one has arrived


def interrupted(pool, interrupt, weights, count=SLOTS - 1):
    """Long responses, while which are generated the engine is stopped and `interrupt` done, with its process."""
    process = pool.members[0].engine.process
    stopped = threading.Event()

    def stop(place, response):
        process.send_signal(signal.SIGSTOP)
        stopped.set()

    requests = [Request(prompt, seed=i) for i, prompt in enumerate(long_prompts(count))]
    long, short = replace(SAMPLING, max_tokens=LONG), replace(SAMPLING, max_tokens=2)
    begun, waiting = requests[: SLOTS - 1], requests[SLOTS - 1 :]
    asked = [
        pool.start(pool.generate(begun, long)),
        pool.start(pool.generate([Request(long_prompts(1)[0], seed=9)], short, 1, stop)),  # beside them
        pool.start(pool.generate(waiting, long)),
    ]

    async def all_long():
        first, _, last = await asyncio.gather(*map(asyncio.wrap_future, asked))
        answers.extend([*first, *last])

    answers: list = []
    ends = threading.Thread(target=lambda: pool.run(all_long(), weights), daemon=True)
    ends.start()
    assert stopped.wait(60)
    interrupt(process)
    ends.join(240)
    return requests, answers


@pytest.fixture
def configured(pool):
    """configured(section={...}): the pool's config is changed for a test."""
    before = pool.config

    def change(**sections):
        changed = {name: getattr(before, name).model_copy(update=keys) for name, keys in sections.items()}
        pool.config = before.model_copy(update=changed)

    yield change
    pool.config = before


@pytest.mark.parametrize(
    ("how", "least"),  # tokens before new weights may interrupt a response
    [
        ({"rollout": {"weight_update": "drain"}}, None),
        ({"rollout": {"weight_update": "in_flight"}}, 1),
        ({"schedule": {"partial_rollouts": 12}}, 12),
    ],
    ids=["drain", "in_flight", "partial"],
)
def test_new_weights_wait_for_responses_as_far_as_the_config_says(pool, learner, configured, tmp_path, how, least):
    """Each token is of the version that it is said to be of, also behind a change of the weights."""
    from transformers import AutoModelForCausalLM

    configured(**how)
    pool.update_weights(learner.hf_weights(), 0)
    learner.export(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    learn(learner, batch_of(*responses(pool)))

    def update(process):
        updating = threading.Thread(target=pool.update_weights, args=(learner.hf_weights(), 1))
        updating.start()
        time.sleep(0.5)  # for the engine to have been told, before it goes on
        process.send_signal(signal.SIGCONT)
        updating.join()

    requests, answers = interrupted(pool, update, None, count=SLOTS + 3)
    assert (answers[-1].weight_versions == 1).all(), "it waited for a slot when the update was asked for"
    interrupted_at = []
    scores, _ = score(learner, batch := batch_of(requests, answers))
    now = scores[batch.mask > 0].split([len(answer.token_ids) for answer in answers])
    for request, answer, by_learner in zip(requests, answers, now, strict=True):
        versions, logprobs = torch.from_numpy(answer.weight_versions), torch.from_numpy(answer.logprobs)
        first = int((versions == 0).sum())
        assert (versions == (torch.arange(len(versions)) >= first)).all()
        if 0 < first < len(versions):
            interrupted_at.append(first)
        assert torch.allclose(logprobs[first:], by_learner[first:], atol=1e-4)
        ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
        logits = before(ids).logits[0, len(request.prompt_ids) - 1 : -1] / SAMPLING.temperature
        then = logits.log_softmax(-1).gather(-1, ids[0, len(request.prompt_ids) :, None])[:, 0]
        assert torch.allclose(logprobs[:first], then[:first], atol=1e-4)
        assert (then - by_learner).abs().max() > 1e-2, "the versions are too alike to tell"
    assert bool(interrupted_at) == bool(least) and all(tokens >= (least or 0) for tokens in interrupted_at)
    _, after = responses(pool)
    assert all((answer.weight_versions == 1).all() for answer in after)


def test_what_a_dead_engine_was_doing_is_done_again_with_the_same_random_numbers(
    pool, learner, configured, capsys, request
):
    fault = {"qwen2": "killed", "llama": "stopped"}[request.node.callspec.params["config"]]
    pool.update_weights(learner.hf_weights(), 0)
    whole = pool.run(
        pool.generate([Request(p, seed=i) for i, p in enumerate(long_prompts(4))], replace(SAMPLING, max_tokens=LONG))
    )
    configured(rollout={"stall_seconds": 3.0 if fault == "stopped" else 300.0})
    restarts = pool.restarts

    def end(process):
        if fault == "killed":
            process.kill()
        process.wait()
        configured(rollout={"stall_seconds": 300.0})  # for the one that is started

    _, again = interrupted(pool, end, learner.hf_weights)
    assert pool.restarts == restarts + 1 and pool.members[0].state == "healthy"
    for one, other in zip(whole, again, strict=True):
        assert (one.token_ids == other.token_ids).all()
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-5)
    said = capsys.readouterr().out
    assert "unfinished responses are generated again" in said
    assert ("has been silent for" in said) == (fault == "stopped")


def test_an_engine_that_is_slow_is_waited_for(pool, learner, configured):
    pool.update_weights(learner.hf_weights(), 0)
    requests = [Request(prompt, seed=i) for i, prompt in enumerate(long_prompts(4))]
    whole = pool.run(pool.generate(requests, replace(SAMPLING, max_tokens=LONG)))
    configured(rollout={"stall_seconds": 10.0})
    restarts = pool.restarts

    def slow_down(process):
        for _ in range(60):  # most of 15 s
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.24)
        process.send_signal(signal.SIGCONT)

    _, slowly = interrupted(pool, slow_down, learner.hf_weights)
    assert pool.restarts == restarts
    for one, other in zip(whole, slowly, strict=True):
        assert (one.token_ids == other.token_ids).all() and np.allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_an_engine_that_dies_asleep_is_started_again_when_the_others_wake(pool, learner):
    pool.update_weights(learner.hf_weights(), 0)
    _, before = responses(pool)
    for _ in range(2):  # asleep, with the weights that it had
        pool.sleep()
        pool.sleep()
        with pytest.raises(RolloutError, match="the engines sleep"):
            responses(pool)
        pool.wake()
        _, after = responses(pool)
        assert all((a.logprobs == b.logprobs).all() for a, b in zip(before, after, strict=True))
    pool.sleep()
    restarts = pool.restarts
    process = pool.members[0].engine.process
    process.kill()
    process.wait()
    pool.update_weights(learner.hf_weights(), 1)  # of which there is nobody to be told
    assert pool.members[0].engine is None and pool.restarts == restarts
    pool.wake()
    requests = [Request(prompt, seed=i) for i, prompt in enumerate(long_prompts(6))]
    again = pool.run(pool.generate(requests, SAMPLING), learner.hf_weights)
    assert pool.restarts == restarts + 1
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(before, again, strict=True))
    pool.sleep()
    pool.update_weights(learner.hf_weights(), 2)
    pool.wake()
    assert all((answer.weight_versions == 2).all() for answer in responses(pool)[1])


def test_when_no_engine_can_be_started_any_more_the_run_ends_with_the_causes(pool, learner, configured, monkeypatch):
    """Last: the engine does not come back."""
    monkeypatch.setattr("megarl.rollout.fleet.RESTARTS", 1)
    configured(model={"path": "/nowhere"})
    pool.members[0].engine.process.kill()
    future = pool.start(pool.generate([Request([2, 3], seed=0)], SAMPLING))
    with pytest.raises(RolloutError, match=r"every engine is dead: rollout engine 0: .*/nowhere.*rollout_0\.log"):
        future.result(timeout=120)
    with pytest.raises(RolloutError, match="every engine is dead"):
        pool.update_weights(learner.hf_weights(), 20)
        pool.run(pool.generate([Request([2, 3], seed=0)], SAMPLING))
