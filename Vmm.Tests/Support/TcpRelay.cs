using System.Net;
using System.Net.Sockets;

namespace Vmm.Tests.Support;

/// <summary>What a relay does when it has seen the bytes that it looks for.</summary>
internal enum RelayFault
{
    /// <summary>Closes both connections; the bytes are lost.</summary>
    Die,
    /// <summary>Forwards nothing more in this direction, and keeps the connections open.</summary>
    MuteThisWay,
    /// <summary>Forwards nothing more in either direction, and keeps the connections open.</summary>
    Mute,
    /// <summary>Forwards nothing more in this direction until it is told to.</summary>
    Delay,
}

/// <summary>
/// Stands between a source and a destination on loopback, as ssh -L or stunnel do: it takes bytes in the peer's place. One fault happens at the first
/// connection, when given bytes pass; later connections pass whole.
/// </summary>
internal sealed class TcpRelay : IDisposable
{
    /// <summary>The destination's confirmation, SHUT(0).</summary>
    internal static readonly byte[] Confirmation = [0, 1, 0, 4, 0, 0, 0, 0];

    /// <summary>The source's final word.</summary>
    internal static readonly byte[] FinalWord = [8, 0x76, 1, 0, 0];

    private readonly TcpListener _listener = new(IPAddress.Loopback, 0);
    private readonly List<Socket> _sockets = [];
    private readonly int _to;
    private readonly (bool Back, byte[] At, RelayFault Fault) _plan;
    private readonly ManualResetEventSlim _goOn = new();
    private readonly List<Thread> _threads = [];
    private int _connections, _happened;

    /// <param name="to">The destination's port on loopback.</param>
    /// <param name="back">True if the bytes go from the destination to the source.</param>
    /// <param name="at">The fault happens when a chunk has these bytes, before any of it is forwarded.</param>
    /// <param name="fault">What happens.</param>
    internal TcpRelay(int to, bool back, byte[] at, RelayFault fault)
    {
        (_to, _plan) = (to, (back, at, fault));
        _listener.Start();
        Run(Accept);
    }

    /// <summary>The port that the source connects to.</summary>
    internal int Port => ((IPEndPoint)_listener.LocalEndpoint).Port;

    /// <summary>Set when the fault has happened.</summary>
    internal ManualResetEventSlim Happened { get; } = new();

    /// <summary>Ends the delay.</summary>
    internal void GoOn() => _goOn.Set();

    public void Dispose()
    {
        _goOn.Set();
        _listener.Stop();
        Close();
        Thread[] threads;
        lock (_threads) threads = [.. _threads];
        foreach (Thread thread in threads) thread.Join();
    }

    private void Accept()
    {
        try
        {
            while (true)
            {
                Socket source = _listener.AcceptSocket();
                var destination = new Socket(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp) { NoDelay = true };
                destination.Connect(IPAddress.Loopback, _to);
                source.NoDelay = true;
                lock (_sockets) _sockets.AddRange([source, destination]);
                bool first = _connections++ == 0;
                Run(() => Pump(source, destination, back: false, first));
                Run(() => Pump(destination, source, back: true, first));
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException or InvalidOperationException)
        {
            // The relay was disposed.
        }
    }

    private void Pump(Socket from, Socket to, bool back, bool first)
    {
        byte[] buffer = new byte[64 << 10];
        bool IsMute() => first && _happened != 0 && (_plan.Fault == RelayFault.Mute || (_plan.Fault == RelayFault.MuteThisWay && back == _plan.Back));
        try
        {
            while (from.Receive(buffer) is > 0 and int n)
            {
                ReadOnlySpan<byte> chunk = buffer.AsSpan(0, n);
                if (first && back == _plan.Back && chunk.IndexOf(_plan.At) >= 0 && Interlocked.Exchange(ref _happened, 1) == 0)
                {
                    if (_plan.Fault == RelayFault.Die) Close();
                    Happened.Set();
                    if (_plan.Fault == RelayFault.Delay) _goOn.Wait();
                }
                if (!IsMute()) to.Send(chunk);
            }
            if (!IsMute()) to.Shutdown(SocketShutdown.Send);
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // One end is gone; the other one learns it.
            if (!IsMute()) Try(() => to.Close());
        }
    }

    private void Close()
    {
        lock (_sockets)
            foreach (Socket socket in _sockets) Try(socket.Close);
    }

    private void Run(Action body)
    {
        var thread = new Thread(() => body()) { IsBackground = true };
        lock (_threads) _threads.Add(thread);
        thread.Start();
    }

    private static void Try(Action action)
    {
        try
        {
            action();
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // It is closed already.
        }
    }
}
