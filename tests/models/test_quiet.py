"""Loading and saving a policy says nothing on stderr, and leaves the libraries' settings alone."""

import warnings

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from meal_fast.models.policy import load_policy
from tests.helpers.run_folder import tiny_config


def test_a_policy_is_loaded_and_saved_in_silence(tmp_path, capfd):
    config = tiny_config()
    load_policy(config.policy, config.names)  # builds the world, the first time
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = load_policy(config.policy, config.names)
        policy.save(tmp_path / "policy")
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()
    AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert "Loading weights" in capfd.readouterr().err
