"""Two replicas on one machine: answers, streams, a replica that is killed, more of them, another bundle, affinity."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
import yaml

pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

from engines.bundle.folder import Bundle
from engines.bundle.manifest import DIGEST, MANIFEST, canonical, digest_of
from tests.paths import ROOT
from tests.runtime.serve.asgi import data_url, user
from tests.runtime.serve.many.cluster import Cluster, running
from tests.runtime.serve.many.pictures import ANSWER, QUESTION, picture

AT_ONCE = 100
KEY = "a-key-of-24-characters-x"


@pytest.fixture(scope="module")
def bundle(default_bundle) -> Path:
    return default_bundle("fp16")


@pytest.fixture(scope="module")
def config(bundle) -> Callable[..., dict[str, Any]]:
    """config(cluster, **args) -> the example's config for this machine."""

    def get(cluster: Cluster, **arguments: object) -> dict[str, Any]:
        content = yaml.safe_load((ROOT / "examples/serve.yaml").read_text())
        content["http_options"]["port"] = cluster.port
        (application,) = content["applications"]
        del application["args"]["max_replicas"]
        application["args"] |= {"bundle": str(bundle), "replicas": 2, "cpus": 0.5, **arguments}
        application["deployments"][0] |= {"health_check_period_s": 1}
        return content

    return get


@pytest.fixture(scope="module")
def cluster(config, tmp_path_factory) -> Iterator[Cluster]:
    with running(FLEX_API_KEY=KEY) as started:
        file = tmp_path_factory.mktemp("config") / "serve.yaml"
        file.write_text(yaml.safe_dump(config(started)))
        started.command("serve", "deploy", file)
        started.until(lambda: started.application().get("status") == "RUNNING")
        yield started


def asked(cluster: Cluster, job: Callable[[Callable[..., Awaitable[Any]]], Awaitable[Any]], prefix: str = "") -> Any:
    """Run job(create), where create(image, **options) is a chat completion of the official client."""

    async def run() -> Any:
        async with openai.AsyncOpenAI(
            base_url=f"{cluster.url}{prefix}/v1", api_key=KEY, max_retries=0, timeout=60
        ) as client:
            (model,) = [each.id async for each in await client.models.list()]
            return await job(
                lambda image, **options: client.chat.completions.create(
                    model=model, messages=[user(QUESTION, data_url(image))], **options
                )
            )

    return asyncio.run(run())


async def text_of(stream: Any) -> str:
    """All of a stream."""
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_a_hundred_at_once(cluster):
    """Each gets the right answer, whole or as a stream."""
    images = [picture(number) for number in range(8)]

    async def job(create: Callable[..., Awaitable[Any]]) -> list[str]:
        async def one(number: int) -> str:
            answer = await create(images[number % 8], stream=bool(number % 2))
            return await text_of(answer) if number % 2 else answer.choices[0].message.content

        return await asyncio.gather(*map(one, range(AT_ONCE)))

    assert asked(cluster, job) == [ANSWER] * AT_ONCE


def test_a_stream_comes_token_by_token(cluster):
    """Not as one piece at its end."""

    async def job(create: Callable[..., Awaitable[Any]]) -> list[float]:
        stream = await create(picture(1), stream=True, temperature=20, seed=4, extra_body={"flex": {"selection": True}})
        return [time.perf_counter() async for _ in stream]

    arrivals = asked(cluster, job)
    assert len(arrivals) > 100 and arrivals[-1] - arrivals[0] > 0.05


def test_other_paths_and_errors_are_those_of_one_machine(cluster):
    assert json.load(urlopen(f"{cluster.url}/health/ready"))["status"] == "ready"
    assert b"<html" in urlopen(f"{cluster.url}/").read()
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{cluster.url}/v1/models")
    assert refused.value.code == 401 and KEY not in json.dumps(cluster.rest("/api/serve/applications/"))

    async def job(create: Callable[..., Awaitable[Any]]) -> None:
        with pytest.raises(openai.UnprocessableEntityError) as caught:  # a replica says so
            await create(b"no image")
        assert caught.value.code == "invalid_image"
        with pytest.raises(openai.BadRequestError) as caught:  # the front does
            await create(picture(0), n=2)
        assert caught.value.param == "n"

    asked(cluster, job)


def test_every_replica_says_what_it_counts(cluster):
    """In Ray's metrics, with its name."""
    deadline = time.monotonic() + 30

    def found() -> set[str]:
        text = "".join(
            urlopen(f"http://{target}/metrics").read().decode()
            for each in cluster.rest("/api/prometheus/sd")
            for target in each["targets"]
        )
        lines = [line for line in text.splitlines() if line.startswith("ray_flex_answer_tokens_total{")]
        return {name for name in cluster.replicas() if any(f'replica="{name}"' in line for line in lines)}

    while len(found()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_affinity(cluster, bundle):
    """Three questions about each of ten images, one after the other: two of three find the image encoded. Ray's own
    router would have to guess right twenty times."""

    async def job(create: Callable[..., Awaitable[Any]]) -> int:
        hits = 0
        for number in range(30):
            answer = await create(picture(100 + number % 10), extra_body={"flex": {}})
            assert answer.choices[0].message.content == ANSWER
            hits += answer.flex["stats"]["view_cached"]
        return hits

    assert asked(cluster, job) == 20
    line = f"BUNDLE={bundle} REPLICAS=2 CPUS=0.3 AFFINITY=false --name plain --route-prefix /plain"
    cluster.command("serve", "run", "--non-blocking", "runtime.serve.ray:deployment", *line.split())
    assert asked(cluster, job, "/plain") < 20


def test_a_killed_replica(cluster):
    """kill -9 in the middle of a stream: only what was being streamed from it fails, and says so; what waited there is
    answered by the other; it is replaced."""
    image, others = picture(200), [picture(201 + number) for number in range(6)]
    long = {"stream": True, "temperature": 20, "seed": 4}

    async def reference(create: Callable[..., Awaitable[Any]]) -> str:
        return await text_of(await create(image, **long))

    whole = asked(cluster, reference)
    assert len(whole) > 300

    async def job(create: Callable[..., Awaitable[Any]]) -> tuple[str, bool, float]:
        stream, text, killed = await create(image, **long), "", False
        waiting = [asyncio.create_task(_right(create, image, bool(number % 2))) for number in range(4)]
        waiting += [asyncio.create_task(_right(create, each, bool(number % 2))) for number, each in enumerate(others)]
        failed = False
        try:
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if not killed and len(text) > 30:
                    os.kill(victim, signal.SIGKILL)
                    killed, when = True, time.monotonic()
        except openai.APIError as error:
            assert error.code == "replica_lost"
            failed = True
        assert await asyncio.gather(*waiting) == [ANSWER] * len(waiting)
        return text, failed, when

    victim = next(iter(cluster.replicas().values()))
    for _ in range(4):  # the other one may have the image; and on a busy machine the answer may have left before
        before = set(cluster.replicas().values())
        text, failed, when = asked(cluster, job)
        assert whole.startswith(text) and failed == (text != whole)
        cluster.until(lambda old=before: len(now := set(cluster.replicas().values())) == 2 and now != old, 30)
        print(f"replaced {time.monotonic() - when:.1f} s after it was killed")
        if failed:
            break
        (victim,) = before - {victim}
    else:
        raise AssertionError("no stream was ever cut")


async def _right(create: Callable[..., Awaitable[Any]], image: bytes, stream: bool) -> str:
    answer = await create(image, stream=stream)
    return await text_of(answer) if stream else answer.choices[0].message.content


def changed(bundle: Path, folder: Path) -> tuple[Path, str]:
    """The same bundle with another page budget, and so another digest."""
    shutil.copytree(bundle, folder)
    content = json.loads((folder / MANIFEST).read_text())
    content["page_budget"] = 40
    content[DIGEST] = digest_of(canonical(content))
    (folder / MANIFEST).write_text(json.dumps(content))
    return folder, Bundle(folder).digest


async def _until(create: Callable[..., Awaitable[Any]], reached: Callable[[], bool], parallel: int) -> int:
    """Ask, so many at a time, until something is reached; returns how many were answered, all of them right."""
    count, done = 0, False

    async def one(start: int) -> None:
        nonlocal count
        number = start
        while not done:
            assert await _right(create, picture(number % 8), bool(number % 2)) == ANSWER
            count += 1
            number += 1

    asking = [asyncio.create_task(one(start)) for start in range(parallel)]
    try:
        while not await asyncio.to_thread(reached):
            assert not any(each.done() for each in asking), [each.exception() for each in asking if each.done()]
            await asyncio.sleep(0.2)
    finally:
        done = True
    await asyncio.gather(*asking)
    return count


def test_another_bundle_without_a_failed_request(cluster, config, bundle, tmp_path):
    """Replicas are replaced one after the other. The new bundle comes from object storage, once for both."""
    folder, digest = changed(bundle, tmp_path / "new")
    before = set(cluster.replicas().values())
    remote = {"bundle": f"file://{folder}", "digest": digest, "cache": str(tmp_path / "cache")}

    def replaced() -> bool:
        now = cluster.replicas()
        return len(now) == 2 and not before & set(now.values()) and cluster.application()["status"] == "RUNNING"

    async def job(create: Callable[..., Awaitable[Any]]) -> int:
        await asyncio.to_thread(cluster.rest, "/api/serve/applications/", config(cluster, **remote))
        return await _until(create, replaced, parallel=4)

    assert asked(cluster, job) > 10
    known = Request(f"{cluster.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    (model,) = json.load(urlopen(known))["data"]
    assert model["flex"]["page_budget"] == 40
    assert [each.name for each in (tmp_path / "cache").iterdir() if each.is_dir()] == [digest.replace(":", "-")]


def test_a_second_replica_when_there_is_work(cluster, config):
    """From one to two under load, without a failed request."""
    content = config(cluster, replicas=1, max_replicas=2, busy=1)
    quick = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 1,
             "look_back_period_s": 3, "initial_replicas": 1, "downscale_delay_s": 1}  # fmt: skip
    content["applications"][0]["deployments"][0]["autoscaling_config"] = quick
    cluster.rest("/api/serve/applications/", content)
    cluster.until(lambda: cluster.application()["status"] == "RUNNING" and len(cluster.replicas()) == 1)

    async def job(create: Callable[..., Awaitable[Any]]) -> int:
        return await _until(create, lambda: len(cluster.replicas()) == 2, parallel=6)

    assert asked(cluster, job) > 10
