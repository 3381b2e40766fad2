"""What a Hub holds and answers: repositories, their commits and large files, and who may do what; and its sockets.

As huggingface_hub 2.4 asks it. Models only; left out are Xet storage, pull requests, tags, gated repositories,
`.gitignore` and the redirect of downloads to another host.
"""
