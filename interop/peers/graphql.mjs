// graphql-ws, both sides: `graphql.mjs serve PORT` with npm `ws`, and `graphql.mjs client`, driven by lines on stdin (lines.mjs).
import { EventEmitter, on } from 'node:events';
import { buildSchema } from 'graphql';
import { createClient } from 'graphql-ws';
import { useServer } from 'graphql-ws/use/ws';
import WebSocket, { WebSocketServer } from 'ws';
import { serve, tell } from './lines.mjs';

const [role, port] = process.argv.slice(2);

if (role === 'serve') {
    const schema = buildSchema(`
        type Query { position: String! }
        type Mutation { move(to: String!): String! }
        type Subscription { positions: String! }
    `);
    const moves = new EventEmitter();
    let position = 'start';
    const roots = {
        query: { position: () => position },
        mutation: {
            move({ to }) {
                position = to;
                moves.emit('move', to);
                return to;
            },
        },
        subscription: {
            // First where it is, so that a subscriber who came back knows what was missed.
            async *positions() {
                const later = on(moves, 'move');
                yield { positions: position };
                for await (const [to] of later) yield { positions: to };
            },
        },
    };
    const server = new WebSocketServer({ host: '127.0.0.1', port: Number(port), path: '/graphql' });
    server.on('listening', () => console.log(JSON.stringify({ event: 'listening' })));
    // The last: between its Pings, in ms; 12 s by default. Who has not answered by the next one is cut, hence not too small.
    useServer({ schema, roots }, server, 5000);
} else {
    const clients = new Map();
    await serve({
        connect({ name, url }) {
            let connected = false;
            const client = createClient({
                url,
                webSocketImpl: WebSocket,
                keepAlive: 1000,
                retryAttempts: 1000,
                // By default a handshake that is refused ends it for good, whatever retryAttempts says.
                shouldRetry: () => true,
                retryWait: () => new Promise((resolve) => setTimeout(resolve, 300)),
                on: {
                    connected(socket) {
                        connected = true;
                        tell('connected', name, { protocol: socket.protocol });
                    },
                    pong: (received) => received && tell('pong', name),
                    // Also of an attempt that came to nothing, which is told as what it is.
                    closed({ code, reason, wasClean }) {
                        tell(connected ? 'close' : 'refused', name, { code, reason, clean: wasClean });
                        connected = false;
                    },
                },
            });
            clients.set(name, client);
            client.subscribe(
                { query: 'subscription { positions }' },
                {
                    next: ({ data }) => tell('position', name, data),
                    error: (error) => tell('error', name, { message: String(error?.message ?? error) }),
                    complete: () => tell('complete', name),
                },
            );
        },

        async run({ name, query }) {
            for await (const { data, errors } of clients.get(name).iterate({ query })) return { data, errors };
        },

        async dispose({ name }) {
            await clients.get(name).dispose();
        },
    });
}
