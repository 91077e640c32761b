#!/bin/sh
# squid_launch.sh CONFIG: start Squid with an empty certificate database and a certificate that it asks for but never shows.
set -e
state=/run/bench/squid
rm -rf $state
mkdir $state
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench \
    -addext basicConstraints=critical,CA:TRUE -keyout $state/key -out $state/crt 2>/dev/null
cat $state/key $state/crt > $state/ca.pem
/usr/lib/squid/security_file_certgen -c -s $state/ssl_db -M 4MB >/dev/null
chown -R proxy $state
exec squid -N -f "$1"
