"""CORAL's cheap LM heads inside vLLM; see docs/vllm.md.

vLLM calls `register` in each of its processes, since it is an entry point of the group
`vllm.general_plugins`. Nothing else of this package imports it.
"""

ARCHITECTURE = "EagleCoralLlamaForCausalLM"


def register() -> None:
    """Tell vLLM which class serves our architecture; it is imported when a drafter asks for it."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"coral.integrations.vllm.model:{ARCHITECTURE}")
