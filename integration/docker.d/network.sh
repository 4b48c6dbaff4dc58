# shellcheck shell=bash
# shellcheck disable=SC2016
# docker's networks.

case_net_bridge() {
  local seen
  seen=$(d_run --rm "$IMAGE" sh -c 'ip -4 addr show eth0; ping -c 1 -W 5 172.17.0.1')
  contains "$seen" 'inet 172.17.'
  contains "$seen" '1 packets received'
}

case_net_publish() {
  web_up -p 127.0.0.1::80
  eventually 20 output_is 'a web page' get "http://$(d port "$C" 80)"
}

case_net_publish_udp() {
  local port
  d_run -d --name "$C" -p 127.0.0.1::9999/udp "$IMAGE" socat UDP-RECV:9999 STDOUT >/dev/null
  port=$(d port "$C" 9999/udp)
  for _ in {1..20}; do
    # Refused until the server listens.
    echo ping | socat - "UDP:$port" || true
    [[ $(d logs "$C") != ping* ]] || return 0
    sleep 0.3
  done
  fail 'no datagram arrived'
}

# As docker-compose sets things up: a network, a server with an alias, a client.
case_net_compose() {
  d network create "$C" >/dev/null
  web_up --network "$C" --network-alias server
  contains "$(d_run --rm --network "$C" "$IMAGE" sh -c 'for i in 1 2 3 4 5; do wget -q -O - http://server && exit; sleep 1; done')" 'a web page'
}

# dns_up: a name server for the networks of the case, at their gateway; its address is
# in DNS.
dns_up() {
  d network create "$C" >/dev/null
  DNS=$(d network inspect -f '{{(index .IPAM.Config 0).Gateway}}' "$C")
  /usr/bin/python3 "$INTEGRATION/lib/dns_server.py" "$DNS" >"$W/dns" &
  DNS_PID=$!
  trap 'kill $DNS_PID; rm -rf "$W"' EXIT
  eventually 10 grep -q ready "$W/dns"
}

case_net_names_of_others() {
  dns_up
  contains "$(d_run --rm --network "$C" --dns "$DNS" "$IMAGE" nslookup some.example.org)" 192.0.2.7
}

# A question with its length in front, by a connection.
case_net_names_by_connection() {
  dns_up
  d_run -d --name "$C" --network "$C" --dns "$DNS" "$IMAGE" sleep 1000
  contains "$(d exec "$C" sh -c "printf '\0\042\1\2\1\0\0\1\0\0\0\0\0\0\4long\7example\3org\0\0\1\0\1' |
    socat -t 10 - TCP:127.0.0.11:53 | od -An -tu1")" '192   0   2   7'
}

# Of programs that have no other sockets.
case_net_names_by_ipv6_sockets() {
  local way
  dns_up
  d_run -d --name "$C" --network "$C" --dns "$DNS" "$IMAGE" sleep 1000
  for way in 'printf "\0\042"; cat;TCP6' 'cat;UDP6'; do
    contains "$(d exec "$C" sh -c "printf '\1\2\1\0\0\1\0\0\0\0\0\0\4some\7example\3org\0\0\1\0\1' |
      (${way%;*}) | socat -t 10 - ${way##*;}:[::ffff:127.0.0.11]:53 | od -An -tu1 | tr -s ' \n' ' '")" '192 0 2 7' "$way"
  done
}

# Unbound and connected sockets, and a server that has the port for itself.
case_net_names_beside_a_server() {
  local server
  d network create "$C" >/dev/null
  d_run -d --name "$C" --network "$C" "$IMAGE" socat -u UDP4-RECVFROM:53,fork OPEN:/tmp/seen,creat,append
  eventually 10 eval "d exec $C sh -c 'echo mine | socat -u - UDP4:127.0.0.1:53; grep -q mine /tmp/seen'"
  server=$(d inspect -f "{{(index .NetworkSettings.Networks \"$C\").IPAddress}}" "$C")
  contains "$(d exec "$C" nslookup "$C")" "$server"
}

case_net_names_after_connect() {
  d network create "$C-2" >/dev/null
  d_run -d --name "$C-other" --network "$C-2" --network-alias other "$IMAGE" sleep 1000
  d_run -d --name "$C" "$IMAGE" sleep 1000
  d network connect "$C-2" "$C"
  eventually 20 d exec "$C" nslookup other
  d network disconnect "$C-2" "$C"
  eventually 20 eval '! docker exec "$C" nslookup other'
}

case_net_connect_and_disconnect() {
  d network create "$C-2" >/dev/null
  web_up
  d network connect "$C-2" "$C"
  eventually 10 output_has eth1 d exec "$C" ls /sys/class/net
  d network disconnect "$C-2" "$C"
  eventually 10 eval '! docker exec "$C" ls /sys/class/net | grep -q eth1'
}

case_net_of_another_container() {
  web_up
  contains "$(d_run --rm --network "container:$C" "$IMAGE" wget -q -O - http://127.0.0.1)" 'a web page'
}

case_net_none_has_only_lo() {
  equal lo "$(once "$IMAGE" ls /sys/class/net | xargs)"
}

case_vm_net_host_is_refused() {
  refused network d_run --rm --network host "$IMAGE" true
}
