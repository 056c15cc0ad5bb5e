// @stomp/stompjs as a client, driven by lines on stdin (lines.mjs). It subscribes on each connection, and comes back by its own rules.
import { Client } from '@stomp/stompjs';
import WebSocket from 'ws';
import { serve, tell } from './lines.mjs';

// What it looks for in a browser.
globalThis.WebSocket = WebSocket;

const DESTINATION = '/topic/positions';
const clients = new Map();

await serve({
    connect({ name, url, heartbeat }) {
        let connected = false;
        const client = new Client({
            brokerURL: url,
            connectHeaders: { login: 'guest', passcode: 'guest' },
            heartbeatIncoming: heartbeat,
            heartbeatOutgoing: heartbeat,
            reconnectDelay: 500,
            debug(line) {
                if (line === '>>> PING') tell('heartbeat-sent', name);
                if (line === '<<< PONG') tell('heartbeat', name);
            },
            onConnect({ headers }) {
                connected = true;
                tell('connected', name, { version: headers.version, server: headers.server, heartbeat: headers['heart-beat'] });
                const receipt = `subscribed-${Math.random()}`;
                client.watchForReceipt(receipt, () => tell('subscribed', name));
                client.subscribe(DESTINATION, (message) => tell('message', name, { body: message.body }), { receipt });
            },
            onStompError: ({ headers }) => tell('error', name, { message: headers.message }),
            // Also of an attempt that came to nothing, which is told as what it is.
            onWebSocketClose({ code, reason, wasClean }) {
                tell(connected ? 'close' : 'refused', name, { code, reason, clean: wasClean });
                connected = false;
            },
        });
        clients.set(name, client);
        client.activate();
    },

    send({ name, body }) {
        clients.get(name).publish({ destination: DESTINATION, body });
    },

    // DISCONNECT, its RECEIPT, and the end.
    async disconnect({ name }) {
        await clients.get(name).deactivate();
    },
});
