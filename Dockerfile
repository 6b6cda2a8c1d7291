# The command line as an image: `docker build -t weightstream .`, then
#
#   docker run weightstream --version
#   docker run -v store:/var/cache/weightstream -e AWS_ACCESS_KEY_ID ... weightstream prefetch s3://models/m
#
# It runs as an ordinary user. Mounting with the kernel driver needs more, on the command line:
#
#   --user 0                               mount(2) wants root, or CAP_SYS_ADMIN and write access to
#                                          the device
#   --device /dev/fuse                     without it no driver works
#   --cap-add SYS_ADMIN                    mount(2), passthrough (in the initial user namespace only)
#                                          and the readahead of the mount
#   --security-opt apparmor=unconfined     Docker's profile forbids mount(2)
#   --mount type=bind,source=/mnt,target=/mnt,bind-propagation=rshared
#                                          else nobody outside of the container sees the mount
#
# and then `mount --foreground --allow-other ORIGIN DIRECTORY`; see docs/MOUNT.md. `fuse-python`, the
# driver for ordinary users, needs the device (readable by all) and fusermount's setuid bit, so not
# `--security-opt no-new-privileges`.
#
# `scripts/try-image` runs these steps without a container engine and starts the result.

FROM debian:bookworm-slim AS build
# fuse-python is C, and has no wheels
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        gcc libc6-dev libfuse-dev pkg-config python3-dev python3-venv
RUN python3 -m venv /opt/weightstream
WORKDIR /build
COPY LICENSE README.md pyproject.toml ./
COPY src ./src
COPY bench ./bench
COPY cachefs ./cachefs
COPY loader ./loader
COPY p2p ./p2p
COPY serve_integration ./serve_integration
# More of pyproject.toml's extras, such as torch: --build-arg EXTRAS=fuse,gcs,hub,torch
ARG EXTRAS=fuse
RUN /opt/weightstream/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM debian:bookworm-slim
# fuse3 brings fusermount (setuid root, and it reads /etc/mtab); fuse-python is linked with libfuse2
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates fuse3 libfuse2 python3-minimal \
        libpython3-stdlib \
    && rm -rf /var/lib/apt/lists/* \
    && echo user_allow_other >> /etc/fuse.conf \
    && ln --symbolic --force /proc/self/mounts /etc/mtab \
    && useradd --system --uid 1000 --create-home weightstream \
    && install --directory --owner weightstream /var/cache/weightstream
COPY --from=build /opt/weightstream /opt/weightstream
ENV PATH=/opt/weightstream/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    WEIGHTSTREAM_STORE=/var/cache/weightstream \
    LANG=C.UTF-8
VOLUME /var/cache/weightstream
# By number, so that Kubernetes can see that it is not root
USER 1000
ENTRYPOINT ["weightstream"]
CMD ["--help"]
