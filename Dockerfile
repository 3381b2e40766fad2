# syntax=docker/dockerfile:1
# The command hf-detrkd for machines with an NVIDIA GPU: see docs/demo_and_image.md.
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime

# The base's PyTorch is new enough for setup.cfg, so that pip keeps it.
RUN --mount=type=bind,target=/source,rw \
    python -m pip install --no-cache-dir '/source[demo,export,trackers]' \
    && useradd --create-home --home-dir /workspace --uid 1000 detrkd \
    && chown detrkd:detrkd /workspace

# Also for `docker run --user`, whose number has no name and no home: caches and outputs are in the mounted folder.
ENV HOME=/workspace \
    USER=detrkd \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
USER 1000
EXPOSE 7860
ENTRYPOINT ["hf-detrkd"]
CMD ["--help"]
