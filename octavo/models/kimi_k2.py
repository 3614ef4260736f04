"""Kimi-K2: DeepSeek-V3's architecture under another model_type."""

from octavo.models.deepseek_v3 import Config, Model

__all__ = ["Config", "Model"]
