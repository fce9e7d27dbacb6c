"""A double of the Hugging Face Hub on loopback ports, for clients in other processes.

It speaks what huggingface_hub 2.4 sends without Xet. Two origins, as on the Hub: one for pages and the API, and a "CDN"
for the content of LFS files, whose URLs are their own permission: there, an Authorization header is refused.

    def test_push(hub, tmp_path):
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path), check=True)
        assert hub.files("alice/model")["config.json"] == ...
"""

from .double import OTHER_TOKEN, READ_ONLY_TOKEN, TOKEN, HubDouble


__all__ = ["OTHER_TOKEN", "READ_ONLY_TOKEN", "TOKEN", "HubDouble"]
