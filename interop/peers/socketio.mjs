// socket.io, both sides: `socketio.mjs serve PORT`, and `socketio.mjs client`, driven by lines on stdin (lines.mjs).
import { createServer } from 'node:http';
import { Server } from 'socket.io';
import { io } from 'socket.io-client';
import { serve, tell } from './lines.mjs';

const [role, port] = process.argv.slice(2);

if (role === 'serve') {
    const http = createServer();
    // Its default is 25 s. How long it waits for an answer stays as it is.
    const server = new Server(http, { pingInterval: 1000 });
    server.on('connection', (socket) => {
        socket.on('say', (text, answer) => {
            server.emit('said', text);
            answer(text.length);
        });
        socket.on('bytes', (bytes, answer) => answer(bytes));
    });
    http.listen(Number(port), '127.0.0.1', () => console.log(JSON.stringify({ event: 'listening' })));
} else {
    const sockets = new Map();
    await serve({
        connect({ name, url, transports }) {
            const socket = io(url, { forceNew: true, transports, reconnectionDelay: 200, reconnectionDelayMax: 1000 });
            sockets.set(name, socket);
            socket.io.on('open', () => {
                const { engine } = socket.io;
                tell('open', name, { transport: engine.transport.name });
                engine.on('upgrade', (transport) => tell('upgrade', name, { transport: transport.name }));
            });
            socket.on('connect', () => tell('connect', name));
            socket.on('said', (text) => tell('said', name, { text }));
            socket.io.on('ping', () => tell('ping', name));
            // `details` is what its transport knows: of a WebSocket, the event of its end.
            socket.on('disconnect', (reason, details) => {
                const { code, wasClean } = details?.context ?? {};
                tell('disconnect', name, { reason, code: code ?? null, clean: wasClean ?? null });
            });
        },

        say: ({ name, text }) => sockets.get(name).timeout(20_000).emitWithAck('say', text),

        async bytes({ name, size }) {
            const sent = Buffer.alloc(size, 'tidegate');
            return sent.equals(Buffer.from(await sockets.get(name).timeout(20_000).emitWithAck('bytes', sent)));
        },

        disconnect({ name }) {
            sockets.get(name).disconnect();
        },
    });
}
