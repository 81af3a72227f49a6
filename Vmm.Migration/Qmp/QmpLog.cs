using Microsoft.Extensions.Logging;

namespace Vmm.Migration.Qmp;

/// <summary>Log messages of the control plane; ids from 3800.</summary>
internal sealed class QmpLog(ILogger logger)
{
    private static readonly Action<ILogger, string, Exception?> s_overflow = LoggerMessage.Define<string>(
        LogLevel.Warning, new EventId(3800, "qmp_client_overflow"), "QMP client disconnected at event {Event}: it does not read its events");

    private static readonly Action<ILogger, Exception?> s_fault = LoggerMessage.Define(
        LogLevel.Error, new EventId(3801, "qmp_command_fault"), "QMP command failed unexpectedly");

    private static readonly Action<ILogger, string, Exception?> s_incoming = LoggerMessage.Define<string>(
        LogLevel.Error, new EventId(3802, "qmp_incoming_failed"), "incoming migration failed, so the process exits: {Reason}");

    private static readonly Action<ILogger, string, Exception?> s_accept = LoggerMessage.Define<string>(
        LogLevel.Warning, new EventId(3803, "qmp_accept"), "QMP socket cannot accept a client: {Reason}");

    private static readonly Action<ILogger, string, Exception?> s_postmigrate = LoggerMessage.Define<string>(
        LogLevel.Warning, new EventId(3804, "qmp_cont_postmigrate"), "the guest runs again after it was migrated away: {Reason}");

    private static readonly Action<ILogger, int, Exception?> s_gaveWay = LoggerMessage.Define<int>(
        LogLevel.Warning, new EventId(3805, "qmp_client_gave_way"), "all {Count} QMP clients' places are taken: disconnected the one idle longest for a new client");

    internal void ClientGaveWay(int count) => s_gaveWay(logger, count, null);

    internal void ClientOverflow(string name) => s_overflow(logger, name, null);

    internal void CommandFault(Exception e) => s_fault(logger, e);

    internal void IncomingFailed(string reason) => s_incoming(logger, reason, null);

    internal void CannotAccept(string reason) => s_accept(logger, reason, null);

    internal void ContinuedAfterMigration(string reason) => s_postmigrate(logger, reason, null);
}
