#!/bin/sh
# HAProxy, ended when whoever started it dies: a Ray that is killed would leave it behind, and the
# port with it. The program's path comes from ingress.py.
if command -v setpriv >/dev/null; then
    exec setpriv --pdeathsig TERM "$TINYCHAT_HAPROXY" "$@"
fi
exec "$TINYCHAT_HAPROXY" "$@"
