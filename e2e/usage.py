"""A line of usage for each request: in a bucket that speaks S3, read with AWS's own SDK, and at a collector, read with
OpenTelemetry's own types. What cannot be sent waits in the store, also when the gateway is killed meanwhile."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time

import boto3
import botocore.exceptions
from backend import ANSWER, PROMPT, Backend, free_port, serving
from client import Failed, expect, sdk, wait_until
from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from up import item, running

SERVER = os.environ["BUCKET_SERVER"]
KEYS = {"AWS_ACCESS_KEY_ID": "of-the-tests", "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests", "AWS_REGION": "us-east-1"}
PRICE = {"perMillionTokens": {"inputMicroUsd": 1000000, "outputMicroUsd": 2000000}}
SOON_S = 40


class Both(Backend):
    """Answers chats, and takes logs as a collector does."""

    records = []

    def answer(self, body):
        if self.path != "/v1/logs":
            return super().answer(body)
        told = json_format.ParseDict(body, ExportLogsServiceRequest())
        for resource in told.resource_logs:
            for scope in resource.scope_logs:
                self.records.extend(scope.log_records)
        return self.tell({})


@contextlib.contextmanager
def bucket(port, folder):
    command = [SERVER, "--access", KEYS["AWS_ACCESS_KEY_ID"], "--secret", KEYS["AWS_SECRET_ACCESS_KEY"], "--region", KEYS["AWS_REGION"]]
    command += ["--port", f"127.0.0.1:{port}", "posix", "--sidecar", os.path.join(folder, "meta"), os.path.join(folder, "data")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def client(port):
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_REGION"],
    )


def lines(s3):
    """All lines in the bucket; none while it is away."""
    try:
        found = s3.list_objects_v2(Bucket="usage", Prefix="penstock/").get("Contents", [])
        texts = [s3.get_object(Bucket="usage", Key=one["Key"])["Body"].read().decode() for one in found]
    except botocore.exceptions.BotoCoreError:
        return []
    return [json.loads(line) for text in texts for line in text.splitlines()]


def objects(upstream):
    rule = {"name": "any", "match": {"models": ["chat"]}, "backends": [{"name": "backend"}]}
    return [
        item("LLMBackend", "backend", {"external": {"url": f"{upstream}/v1"}, "price": PRICE}),
        item("RoutingPolicy", "default", {"rules": [rule]}),
    ]


def chat(url, count):
    for _ in range(count):
        sdk(url).chat.completions.create(model="chat", messages=[{"role": "user", "content": "Hello."}])


def prove_bucket(upstream, folder):
    for name in ("data/usage", "meta"):
        os.makedirs(os.path.join(folder, name))
    port = free_port()
    env = {**KEYS, "AWS_ENDPOINT": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true"}
    flags = ("--usage-export", "s3://usage/penstock", "--store", f"file:{folder}/store.redb")
    s3 = client(port)
    with bucket(port, folder):
        with running(objects(upstream), *flags, env=env) as (_, url):
            chat(url, 5)
            told = wait_until("five lines in the bucket", lambda: len(lines(s3)) >= 5 and lines(s3), SOON_S)
        sums = {name: sum(line[name] for line in told) for name in ("requests", "inputTokens", "outputTokens", "picoUsd")}
        cost = 5 * (PROMPT * 1000000 + ANSWER * 2000000)
        done = expect(sums, {"requests": 5, "inputTokens": 5 * PROMPT, "outputTokens": 5 * ANSWER, "picoUsd": cost}, "five lines")
        done += expect(len({line["id"] for line in told}), 5, "ids of five lines")
        done += expect({line["backend"] for line in told}, {"default/backend"}, "who answered")
    # The bucket is away, and the gateway is killed: what it wrote into its store within a second comes later.
    own = free_port()
    with running(objects(upstream), *flags, env=env, port=own) as (up, url):
        chat(url, 3)
        time.sleep(2)
        up.kill()
    with bucket(port, folder):
        with running(objects(upstream), *flags, env=env, port=own):
            told = wait_until("eight lines in the bucket", lambda: len(lines(s3)) >= 8 and lines(s3), SOON_S)
    return done + expect(len({line["id"] for line in told}), 8, "ids of eight lines")


def prove_collector(upstream, folder):
    flags = ("--usage-export", f"otlp+{upstream}", "--store", f"file:{folder}/other.redb")
    with running(objects(upstream), *flags) as (_, url):
        chat(url, 4)
        wait_until("four records", lambda: len(Both.records) >= 4, SOON_S)
    first = {one.key: one.value for one in Both.records[0].attributes}
    done = expect(first["gen_ai.usage.input_tokens"].int_value, PROMPT, "tokens of a record")
    done += expect(first["gen_ai.request.model"].string_value, "chat", "the model of a record")
    return done + expect(Both.records[0].event_name, "penstock.usage", "the name of a record")


def main():
    with serving(Both) as upstream, tempfile.TemporaryDirectory() as folder:
        done = prove_bucket(upstream, folder) + prove_collector(upstream, folder)
    print(f"usage: ok={done} failed=0")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        print(f"usage: {failed}")
        sys.exit(1)
