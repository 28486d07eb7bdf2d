"""The gateways under test: ours and its peers, each started with its own configuration for the same routes."""

from subjects.envoy import Envoy
from subjects.litellm import LiteLLM
from subjects.penstock import Penstock
from subjects.portkey import Portkey
from subjects.vllm_router import VllmRouter

SUBJECTS = {subject.name: subject for subject in (Penstock, LiteLLM, Portkey, VllmRouter, Envoy)}
